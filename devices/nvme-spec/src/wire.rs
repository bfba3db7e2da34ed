//! Little-endian structures described by byte offsets, as the specification prints them.

/// A value with a fixed wire size.
pub trait Field: Sized {
    /// Bytes on the wire.
    const SIZE_BYTES: usize;
    /// Reads from the start of `bytes`, which holds at least `SIZE_BYTES`.
    fn get(bytes: &[u8]) -> Self;
    /// Writes to the start of `bytes`, which holds at least `SIZE_BYTES`.
    fn put(&self, bytes: &mut [u8]);
}

macro_rules! integer_fields {
    ($($type:ty),*) => {$(
        impl Field for $type {
            const SIZE_BYTES: usize = size_of::<$type>();
            fn get(bytes: &[u8]) -> Self {
                let mut raw = [0; size_of::<$type>()];
                raw.copy_from_slice(&bytes[..size_of::<$type>()]);
                <$type>::from_le_bytes(raw)
            }
            fn put(&self, bytes: &mut [u8]) {
                bytes[..size_of::<$type>()].copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

integer_fields!(u8, u16, u32, u64, u128);

impl<T: Field, const N: usize> Field for [T; N] {
    const SIZE_BYTES: usize = N * T::SIZE_BYTES;
    fn get(bytes: &[u8]) -> Self {
        core::array::from_fn(|index| T::get(&bytes[index * T::SIZE_BYTES..]))
    }
    fn put(&self, bytes: &mut [u8]) {
        for (index, item) in self.iter().enumerate() {
            item.put(&mut bytes[index * T::SIZE_BYTES..]);
        }
    }
}

/// Whether fields given as `(offset, size)` are in order, do not overlap and end within `total` bytes.
pub const fn fields_fit(fields: &[(usize, usize)], total: usize) -> bool {
    let mut end = 0;
    let mut index = 0;
    while index < fields.len() {
        if fields[index].0 < end {
            return false;
        }
        end = fields[index].0 + fields[index].1;
        index += 1;
    }
    end <= total
}

/// Declares a structure of `size` bytes; each field is preceded by its byte offset.
macro_rules! wire_struct {
    ($(#[$meta:meta])* pub struct $name:ident [$size:literal] {
        $($(#[$field_meta:meta])* $offset:literal: $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }

        impl $name {
            /// Size on the wire in bytes.
            pub const SIZE_BYTES: usize = $size;

            /// Reads the wire form. Reserved bytes are ignored.
            #[must_use]
            pub fn from_bytes(bytes: &[u8; $size]) -> Self {
                Self { $($field: $crate::wire::Field::get(&bytes[$offset..]),)* }
            }

            /// The wire form. Reserved bytes are zero.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; $size] {
                let mut bytes = [0; $size];
                $($crate::wire::Field::put(&self.$field, &mut bytes[$offset..]);)*
                bytes
            }
        }

        impl Default for $name {
            /// All fields zero.
            fn default() -> Self {
                Self::from_bytes(&[0; $size])
            }
        }

        impl $crate::wire::Field for $name {
            const SIZE_BYTES: usize = $size;
            fn get(bytes: &[u8]) -> Self {
                let mut raw = [0; $size];
                raw.copy_from_slice(&bytes[..$size]);
                Self::from_bytes(&raw)
            }
            fn put(&self, bytes: &mut [u8]) {
                bytes[..$size].copy_from_slice(&self.to_bytes());
            }
        }

        const _: () = assert!($crate::wire::fields_fit(
            &[$(($offset, <$type as $crate::wire::Field>::SIZE_BYTES)),*],
            $size,
        ));
    };
}

#[cfg(test)]
mod tests {
    use super::fields_fit;

    #[test]
    fn overlapping_and_overlong_layouts_are_refused() {
        assert!(fields_fit(&[(0, 4), (4, 4), (12, 4)], 16));
        assert!(!fields_fit(&[(0, 4), (3, 1)], 16));
        assert!(!fields_fit(&[(12, 8)], 16));
    }
}
