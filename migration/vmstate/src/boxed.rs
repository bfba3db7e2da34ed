//! A large nested struct can live on the heap: the bytes are the same, and what is moved is a pointer.

use crate::schema::Outer;
use crate::{Description, Error, Reader, Schema, VmState};

impl<T: VmState> VmState for Box<T> {
    const NAME: &'static str = T::NAME;
    const VERSION: u32 = T::VERSION;
    const OLDEST: u32 = T::OLDEST;
    const LEAST_BYTES: usize = T::LEAST_BYTES;
    const STACK_BYTES: usize = T::STACK_BYTES;

    fn save_fields(&self, out: &mut Vec<u8>) {
        T::save_fields(self, out);
    }

    fn load_fields(reader: &mut Reader<'_>, version: u32) -> Result<Self, Error> {
        reader.spend(size_of::<T>())?;
        T::load_fields(reader, version).map(Box::new)
    }

    fn describe_fields(&self, description: &mut Description) {
        T::describe_fields(self, description);
    }

    fn schema_within(outer: Option<&Outer<'_>>) -> Schema {
        // The box is one of the structs outside as well: a struct that contains itself in boxes is found again.
        T::schema_within(Some(&Outer::new::<Self>(outer)))
    }
}

#[cfg(test)]
mod tests {
    use crate::{VmState, describe, from_bytes, schema_json, to_bytes};

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "inner", version = 3)]
    struct Inner {
        run: [u8; 3],
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "outer", version = 1)]
    struct Plain {
        inner: Inner,
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "outer", version = 1)]
    struct Boxed {
        inner: Box<Inner>,
    }

    #[test]
    fn a_box_is_what_is_in_it() {
        let plain = Plain { inner: Inner { run: [1, 2, 3] } };
        let boxed = Boxed { inner: Box::new(Inner { run: [1, 2, 3] }) };
        assert_eq!(to_bytes(&boxed), to_bytes(&plain));
        assert_eq!(from_bytes::<Boxed>(&[1, 2, 3], 1), Ok(boxed));
        let boxed = from_bytes::<Boxed>(&[1, 2, 3], 1).unwrap();
        assert_eq!(describe(&boxed), describe(&plain));
        assert_eq!(schema_json::<Boxed>(), schema_json::<Plain>());
        assert_eq!(from_bytes::<Boxed>(&[1, 2], 1).unwrap_err().path, "inner.run");
    }
}
