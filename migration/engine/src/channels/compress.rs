//! Pages made smaller, and large again: never larger than they are known to be.

use std::fmt;
use std::str::FromStr;

use super::wire::RunKind;
use crate::Error;

/// The fastest level that compresses much better than LZ4.
const ZSTD_LEVEL: i32 = 1;

/// How channels compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: pages go from where they are.
    #[default]
    None,
    /// LZ4: fast.
    Lz4,
    /// Zstandard: small.
    Zstd,
}

impl Compression {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::None, Self::Lz4, Self::Zstd];

    /// As users write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|compression| compression.name() == text)
            .ok_or_else(|| format!("{text:?} is none of none, lz4 and zstd"))
    }
}

/// Compresses for one channel.
pub(crate) struct Compressor {
    kind: Kind,
    out: Vec<u8>,
}

enum Kind {
    Lz4,
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Compressor {
    /// `None` where nothing is compressed.
    pub fn new(compression: Compression) -> Result<Option<Self>, Error> {
        let failed =
            |source: std::io::Error| Error::Machine { doing: "prepare to compress", source: source.into() };
        let kind = match compression {
            Compression::None => return Ok(None),
            Compression::Lz4 => Kind::Lz4,
            Compression::Zstd => {
                Kind::Zstd(Box::new(zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(failed)?))
            }
        };
        Ok(Some(Self { kind, out: Vec::new() }))
    }

    /// What [`compress`](Self::compress) makes.
    pub fn kind(&self) -> RunKind {
        match self.kind {
            Kind::Lz4 => RunKind::Lz4,
            Kind::Zstd(_) => RunKind::Zstd,
        }
    }

    /// `bytes` made smaller; `None` if they cannot be.
    pub fn compress(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        let length = match &mut self.kind {
            Kind::Lz4 => {
                self.out.resize(lz4_flex::block::get_maximum_output_size(bytes.len()), 0);
                lz4_flex::block::compress_into(bytes, &mut self.out).ok()?
            }
            Kind::Zstd(zstd) => {
                // What does not fit is not wanted.
                self.out.resize(bytes.len(), 0);
                zstd.compress_to_buffer(bytes, self.out.as_mut_slice()).ok()?
            }
        };
        (length < bytes.len()).then(|| self.out.get(..length)).flatten()
    }
}

/// Makes runs of one channel large again.
#[derive(Default)]
pub(crate) struct Decompressor {
    zstd: Option<Box<zstd::bulk::Decompressor<'static>>>,
}

impl Decompressor {
    /// Fills `pages` from `bytes`: exactly, or it is refused. Nothing is written beyond `pages`.
    pub fn decompress(&mut self, kind: RunKind, bytes: &[u8], pages: &mut [u8]) -> Result<(), String> {
        let length = match kind {
            RunKind::Lz4 => {
                lz4_flex::block::decompress_into(bytes, pages).map_err(|error| format!("LZ4: {error}"))?
            }
            RunKind::Zstd => {
                let wrong = |error| format!("Zstandard: {error}");
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Box::new(zstd::bulk::Decompressor::new().map_err(wrong)?)),
                };
                zstd.decompress_to_buffer(bytes, pages).map_err(wrong)?
            }
            RunKind::Zero | RunKind::Data => return Err(format!("{kind:?} is not compressed")),
        };
        match length == pages.len() {
            true => Ok(()),
            false => Err(format!("{length} bytes came out of {kind:?} where {} belong", pages.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Vec<u8> {
        (0..16384_u32).map(|byte| (byte / 64 % 7) as u8).collect()
    }

    #[test]
    fn what_was_compressed_comes_back_and_nothing_beyond() {
        for compression in [Compression::Lz4, Compression::Zstd] {
            let mut compressor = Compressor::new(compression).unwrap().unwrap();
            let kind = compressor.kind();
            let smaller = compressor.compress(&text()).unwrap().to_vec();
            assert!(smaller.len() < text().len() / 4);
            let mut decompressor = Decompressor::default();
            let mut pages = vec![0; text().len()];
            decompressor.decompress(kind, &smaller, &mut pages).unwrap();
            assert!(pages == text(), "{compression}");
            for wrong in [4096, 12288, 20480] {
                let error = decompressor.decompress(kind, &smaller, &mut vec![0; wrong]).unwrap_err();
                assert!(!error.is_empty());
            }
            for cut in 0..smaller.len() {
                assert!(decompressor.decompress(kind, &smaller[..cut], &mut pages).is_err(), "{cut}");
            }
        }
        assert!(Compressor::new(Compression::None).unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_made_smaller_stays_as_it_is() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(8192)
        .collect();
        for compression in [Compression::Lz4, Compression::Zstd] {
            assert_eq!(
                Compressor::new(compression).unwrap().unwrap().compress(&noise),
                None,
                "{compression}"
            );
        }
    }

    #[test]
    fn names_are_those_that_are_understood() {
        for compression in Compression::ALL {
            assert_eq!(compression.to_string().parse(), Ok(compression));
        }
        assert!("LZ4".parse::<Compression>().unwrap_err().contains("none of"));
    }
}
