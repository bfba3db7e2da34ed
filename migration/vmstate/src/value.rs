//! How each kind of field value is laid out: integers, bools, arrays, nested structs.

use crate::description::Description;
use crate::schema::{FieldSchema, Outer};
use crate::{Error, Problem, Reader, VmState};

/// A value that needs no length from outside: an integer, a bool, an array of such, or a struct that derives [`VmState`].
///
/// Runs of values have their own functions, because a run of bytes is one copy and a run of equal elements one entry of the
/// description.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be saved as a field",
    label = "not an integer, a bool, an array, or a struct that derives `VmState`",
    note = "`Vec`, `Slots` and `Bitmap` need `#[vmstate(len = \"count_field\", max = N)]`, or a `Vec` `#[vmstate(list, max = N)]`; \
            a `Vec` of those needs `each_len` and `each_max` too; an `Option` needs `#[vmstate(subsection)]`; enums are saved as \
            integers and checked by the device's constructor"
)]
pub trait Value: Sized {
    /// The fewest bytes that a value takes on the wire.
    const LEAST_BYTES: usize;
    /// What a load has on the stack for the structs inside, roughly: see [`VmState::STACK_BYTES`].
    const STACK_BYTES: usize = 0;
    /// The version of the struct inside, for values that have one.
    const STRUCT_VERSION: u32 = 1;
    /// The oldest readable version of the struct inside, for values that have one.
    const STRUCT_OLDEST: u32 = 1;

    /// Appends the value.
    fn save(&self, out: &mut Vec<u8>);

    /// Reads the value as `version` of its struct wrote it; only structs look at the version.
    fn load(reader: &mut Reader<'_>, version: u32) -> Result<Self, Error>;

    /// Adds the entries for this value.
    fn describe(&self, name: &str, description: &mut Description);

    /// Fills in what the type says of itself as a part of the structs `outer`.
    fn schema(field: &mut FieldSchema, outer: &Outer<'_>);

    /// Appends a run of values, back to back.
    fn save_run(run: &[Self], out: &mut Vec<u8>) {
        for value in run {
            value.save(out);
        }
    }

    /// Reads `count` values. The caller has bounded `count`; memory is taken only if there are bytes to fill it.
    fn load_run(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Vec<Self>, Error> {
        let mut run = reader.room(count, Self::LEAST_BYTES)?;
        reader.promise(count.saturating_mul(Self::LEAST_BYTES));
        for index in 0..count {
            reader.keep(Self::LEAST_BYTES);
            run.push(Self::load(reader, version).map_err(|error| error.at_index(index))?);
        }
        Ok(run)
    }

    /// Reads a run whose length the type states.
    fn load_array<const N: usize>(reader: &mut Reader<'_>, version: u32) -> Result<[Self; N], Error> {
        let run = Self::load_run(reader, N, version)?;
        reader.refund(size_of::<[Self; N]>());
        Ok(run.try_into().unwrap_or_else(|_| unreachable!("load_run returns as many values as asked")))
    }

    /// Reads `count` such arrays.
    fn load_arrays<const N: usize>(
        reader: &mut Reader<'_>,
        count: usize,
        version: u32,
    ) -> Result<Vec<[Self; N]>, Error> {
        let mut run = reader.room(count, Self::LEAST_BYTES.saturating_mul(N))?;
        for index in 0..count {
            run.push(Self::load_array(reader, version).map_err(|error| error.at_index(index))?);
        }
        Ok(run)
    }

    /// Adds the entries for a run of values: none for an empty one.
    fn describe_run(run: &[Self], name: &str, description: &mut Description) {
        description.run(run, name);
    }
}

/// Bytes of values that are turned around together, in registers, before they are appended.
const TURNED_TOGETHER_BYTES: usize = 256;

/// Places for arrays that come next, and the bytes that are to fill them.
fn room_for_arrays<'a, T: Copy + Default, const N: usize>(
    reader: &mut Reader<'a>,
    count: usize,
) -> Result<(Vec<[T; N]>, &'a [u8]), Error> {
    let array_bytes = size_of::<[T; N]>();
    let mut run = reader.room(count, array_bytes)?;
    run.resize(count, [T::default(); N]);
    Ok((run, reader.take(count * array_bytes)?))
}

/// Turns the bytes of as many values as there are places.
fn fill<T, const SIZE: usize>(places: &mut [T], bytes: &[u8], turn: impl Fn([u8; SIZE]) -> T) {
    for (place, value) in places.iter_mut().zip(bytes.as_chunks().0) {
        *place = turn(*value);
    }
}

macro_rules! integers {
    ($($type:ty, $name:literal;)*) => {$(
        impl Value for $type {
            const LEAST_BYTES: usize = size_of::<$type>();

            #[inline]
            fn save(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }

            #[inline]
            fn load(reader: &mut Reader<'_>, _version: u32) -> Result<Self, Error> {
                Ok(<$type>::from_be_bytes(reader.array()?))
            }

            fn save_run(run: &[Self], out: &mut Vec<u8>) {
                out.reserve(size_of_val(run));
                const TOGETHER: usize = TURNED_TOGETHER_BYTES / size_of::<$type>();
                let (together, rest) = run.as_chunks::<TOGETHER>();
                for values in together {
                    out.extend_from_slice(values.map(<$type>::to_be_bytes).as_flattened());
                }
                rest.iter().for_each(|value| value.save(out));
            }

            fn load_run(reader: &mut Reader<'_>, count: usize, _version: u32) -> Result<Vec<Self>, Error> {
                let mut run = reader.room(count, Self::LEAST_BYTES)?;
                let (values, _) = reader.take(count * Self::LEAST_BYTES)?.as_chunks();
                run.extend(values.iter().map(|value| <$type>::from_be_bytes(*value)));
                Ok(run)
            }

            fn load_array<const N: usize>(reader: &mut Reader<'_>, _version: u32) -> Result<[Self; N], Error> {
                let mut array = [0; N];
                fill(&mut array, reader.take(size_of::<[Self; N]>())?, Self::from_be_bytes);
                Ok(array)
            }

            fn load_arrays<const N: usize>(
                reader: &mut Reader<'_>,
                count: usize,
                _version: u32,
            ) -> Result<Vec<[Self; N]>, Error> {
                let (mut run, bytes) = room_for_arrays::<Self, N>(reader, count)?;
                fill(run.as_flattened_mut(), bytes, Self::from_be_bytes);
                Ok(run)
            }

            fn describe(&self, name: &str, description: &mut Description) {
                description.plain(name, $name, size_of::<$type>(), 1);
            }

            fn describe_run(run: &[Self], name: &str, description: &mut Description) {
                description.plain(name, $name, size_of::<$type>(), run.len());
            }

            fn schema(field: &mut FieldSchema, _outer: &Outer<'_>) {
                field.plain($name, size_of::<$type>());
            }
        }
    )*};
}

integers! {
    u16, "uint16"; u32, "uint32"; u64, "uint64";
    i8, "int8"; i16, "int16"; i32, "int32"; i64, "int64";
}

/// Runs of bytes are one copy, and one entry of type `buffer`.
impl Value for u8 {
    const LEAST_BYTES: usize = 1;

    #[inline]
    fn save(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }

    #[inline]
    fn load(reader: &mut Reader<'_>, _version: u32) -> Result<Self, Error> {
        reader.byte()
    }

    fn save_run(run: &[Self], out: &mut Vec<u8>) {
        out.extend_from_slice(run);
    }

    fn load_run(reader: &mut Reader<'_>, count: usize, _version: u32) -> Result<Vec<Self>, Error> {
        let mut run = reader.room(count, 1)?;
        run.extend_from_slice(reader.take(count)?);
        Ok(run)
    }

    #[inline]
    fn load_array<const N: usize>(reader: &mut Reader<'_>, _version: u32) -> Result<[Self; N], Error> {
        reader.array()
    }

    fn load_arrays<const N: usize>(
        reader: &mut Reader<'_>,
        count: usize,
        _version: u32,
    ) -> Result<Vec<[Self; N]>, Error> {
        let (mut run, bytes) = room_for_arrays::<u8, N>(reader, count)?;
        run.as_flattened_mut().copy_from_slice(bytes);
        Ok(run)
    }

    fn describe(&self, name: &str, description: &mut Description) {
        description.plain(name, "uint8", 1, 1);
    }

    fn describe_run(run: &[Self], name: &str, description: &mut Description) {
        if !run.is_empty() {
            description.plain(name, "buffer", run.len(), 1);
        }
    }

    fn schema(field: &mut FieldSchema, _outer: &Outer<'_>) {
        field.plain("uint8", 1);
    }
}

impl Value for bool {
    const LEAST_BYTES: usize = 1;

    #[inline]
    fn save(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    #[inline]
    fn load(reader: &mut Reader<'_>, _version: u32) -> Result<Self, Error> {
        match reader.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Problem::NotBool(other).into()),
        }
    }

    fn save_run(run: &[Self], out: &mut Vec<u8>) {
        out.extend(run.iter().map(|value| u8::from(*value)));
    }

    fn load_run(reader: &mut Reader<'_>, count: usize, _version: u32) -> Result<Vec<Self>, Error> {
        let mut run = reader.room(count, 1)?;
        let bytes = reader.take(count)?;
        // All of them are looked at together, which takes a few instructions for many; which one it was matters only then.
        if bytes.iter().fold(0, |all, byte| all | byte) > 1
            && let Some(index) = bytes.iter().position(|byte| *byte > 1)
        {
            return Err(Error::from(Problem::NotBool(bytes[index])).at_index(index));
        }
        run.extend(bytes.iter().map(|byte| *byte == 1));
        Ok(run)
    }

    fn describe(&self, name: &str, description: &mut Description) {
        description.plain(name, "bool", 1, 1);
    }

    fn describe_run(run: &[Self], name: &str, description: &mut Description) {
        description.plain(name, "bool", 1, run.len());
    }

    fn schema(field: &mut FieldSchema, _outer: &Outer<'_>) {
        field.plain("bool", 1);
    }
}

impl<T: Value, const N: usize> Value for [T; N] {
    const LEAST_BYTES: usize = T::LEAST_BYTES.saturating_mul(N);
    const STACK_BYTES: usize = T::STACK_BYTES;
    const STRUCT_VERSION: u32 = T::STRUCT_VERSION;
    const STRUCT_OLDEST: u32 = T::STRUCT_OLDEST;

    fn save(&self, out: &mut Vec<u8>) {
        T::save_run(self, out);
    }

    fn load(reader: &mut Reader<'_>, version: u32) -> Result<Self, Error> {
        T::load_array(reader, version)
    }

    fn save_run(run: &[Self], out: &mut Vec<u8>) {
        T::save_run(run.as_flattened(), out);
    }

    fn load_run(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Vec<Self>, Error> {
        T::load_arrays(reader, count, version)
    }

    fn describe(&self, name: &str, description: &mut Description) {
        T::describe_run(self, name, description);
    }

    fn describe_run(run: &[Self], name: &str, description: &mut Description) {
        T::describe_run(run.as_flattened(), name, description);
    }

    fn schema(field: &mut FieldSchema, outer: &Outer<'_>) {
        T::schema(field, outer);
        field.repeat(N);
    }
}

/// A nested struct is its fields, without a header.
impl<T: VmState> Value for T {
    const LEAST_BYTES: usize = T::LEAST_BYTES;
    const STACK_BYTES: usize = T::STACK_BYTES;
    const STRUCT_VERSION: u32 = T::VERSION;
    const STRUCT_OLDEST: u32 = T::OLDEST;

    fn save(&self, out: &mut Vec<u8>) {
        self.save_fields(out);
    }

    fn load(reader: &mut Reader<'_>, version: u32) -> Result<Self, Error> {
        Self::load_fields(reader, version)
    }

    fn describe(&self, name: &str, description: &mut Description) {
        description.structure(name, self);
    }

    fn schema(field: &mut FieldSchema, outer: &Outer<'_>) {
        field.structure::<T>(outer);
    }
}
