//! `#[derive(VmState)]`: writes the description, `save` and `load` of a plain struct.
//!
//! The attributes are described in the `vmstate` crate. `attributes` parses and checks those of the struct, `options` those of a field,
//! and a `field` is what they agree on; `expand` writes the code. Every mistake becomes an error at the place it was made; what only
//! types can tell (a field that is no [`Value`], a struct that contains itself, a nested struct whose versions do not fit) is left to
//! the compiler, at the field's type.
//!
//! [`Value`]: https://docs.rs/vmstate

#![forbid(unsafe_code)]

use proc_macro::TokenStream;

mod attributes;
mod expand;
mod field;
mod options;

/// Derives `vmstate::VmState` for a struct with named fields.
#[proc_macro_derive(VmState, attributes(vmstate))]
pub fn derive_vm_state(input: TokenStream) -> TokenStream {
    let input = syn::parse_macro_input!(input as syn::DeriveInput);
    attributes::Description::parse(&input)
        .map(|description| expand::expand(&description))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
