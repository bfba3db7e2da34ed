//! What the derive refuses, and where it points.

#[test]
fn mistakes_are_errors_at_their_place() {
    trybuild::TestCases::new().compile_fail("tests/mistakes/*.rs");
}
