//! What goes one way of one connection, piece by piece: a frame, a batch of a data channel, a record of TLS.
//!
//! Nothing is understood but where a piece ends and of which kind it is. What is none of these is carried as it comes. Pieces are
//! read one by one, since descriptors arrive with the first byte of a frame.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use stream::frame::{HEADER_BYTES, Header, Kind, PREAMBLE};
use transport::{DESCRIPTORS_MAX, Received};

use crate::passing::fill;

/// Of bytes that are nothing known.
const RAW_BYTES_MAX: usize = 256 << 10;
/// The head of a batch: "RB", kind, 0, be32 round, be16 runs, be16 digests, be32 bytes of contents.
const BATCH_HEAD_BYTES: usize = 16;
const BATCH_MARK: [u8; 2] = *b"RB";
/// The kind of the last batch, after which there is a digest and nothing more.
const BATCH_END: u8 = 2;
const RUN_BYTES: usize = 16;
const DIGEST_BYTES: usize = 8;
/// Where a channel hello says which channel it is: after its header, the session and the key.
const CHANNEL_INDEX: usize = HEADER_BYTES + 16 + 16;
/// The head of a record: its type, a version, be16 bytes that follow ("RFC 8446, 5.1").
const RECORD_HEAD_BYTES: usize = 5;
/// A record type in its content, and a tag behind it ("RFC 8446, 5.2").
const SEALED_BYTES: usize = 1 + 16;
/// The types of records: change_cipher_spec, alert, handshake, application_data.
const RECORD_TYPES: std::ops::RangeInclusive<u8> = 20..=23;
const APPLICATION_DATA: u8 = 23;

/// What a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Of a connection without TLS; with TLS it is known by its length alone, if it is of a kind that has one of its own.
    Frame(Kind),
    /// Pages on a data channel.
    Batch { channel: u16, is_last: bool },
    /// A preamble, a part of a handshake, or the last bytes of a connection that broke.
    Other,
}

/// A piece that came.
#[derive(Debug)]
pub(crate) struct Piece {
    pub what: What,
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// Takes apart what comes.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    form: Form,
    channel: u16,
}

#[derive(Clone, Copy, Debug, Default)]
enum Form {
    /// Nothing has come.
    #[default]
    Unknown,
    Frames,
    Records,
    Raw,
}

impl Pieces {
    /// The next piece, or nothing if the connection has ended.
    pub fn next(&mut self, from: &mut UnixStream) -> io::Result<Option<Piece>> {
        let (mut bytes, mut received) = (Vec::new(), Received::new(DESCRIPTORS_MAX));
        let mut more = |bytes: &mut Vec<u8>, wanted| fill(from, bytes, wanted, &mut received);
        let what = match self.form {
            Form::Unknown => self.begin(&mut bytes, &mut more),
            Form::Frames => self.frame(&mut bytes, &mut more),
            Form::Records => record(&mut bytes, &mut more),
            Form::Raw => raw(from, &mut bytes),
        }?;
        let descriptors = received.into_descriptors();
        Ok((!bytes.is_empty()).then_some(Piece { what, bytes, descriptors }))
    }

    fn begin(
        &mut self,
        bytes: &mut Vec<u8>,
        more: &mut impl FnMut(&mut Vec<u8>, usize) -> io::Result<bool>,
    ) -> io::Result<What> {
        more(bytes, RECORD_HEAD_BYTES)?;
        self.form = match bytes.first() {
            Some(kind) if RECORD_TYPES.contains(kind) => Form::Records,
            _ if bytes.starts_with(&PREAMBLE) => Form::Frames,
            _ => Form::Raw,
        };
        match self.form {
            Form::Records => record(bytes, more),
            Form::Frames => more(bytes, HEADER_BYTES).map(|_| What::Other),
            Form::Unknown | Form::Raw => Ok(What::Other),
        }
    }

    fn frame(
        &mut self,
        bytes: &mut Vec<u8>,
        more: &mut impl FnMut(&mut Vec<u8>, usize) -> io::Result<bool>,
    ) -> io::Result<What> {
        if !more(bytes, HEADER_BYTES)? {
            return Ok(What::Other);
        }
        if bytes.starts_with(&BATCH_MARK) {
            return self.batch(bytes, more);
        }
        let header = bytes.as_slice().try_into().ok().and_then(|header| Header::decode(header).ok());
        let Some(Header { kind, length_bytes, .. }) = header else {
            self.form = Form::Raw;
            return Ok(What::Other);
        };
        if !more(bytes, HEADER_BYTES + length_bytes as usize)? {
            return Ok(What::Other);
        }
        if kind == Kind::ChannelHello
            && let Some(index) = bytes.get(CHANNEL_INDEX..CHANNEL_INDEX + 2)
        {
            self.channel = be16(index);
        }
        Ok(What::Frame(kind))
    }

    fn batch(
        &self,
        bytes: &mut Vec<u8>,
        more: &mut impl FnMut(&mut Vec<u8>, usize) -> io::Result<bool>,
    ) -> io::Result<What> {
        if !more(bytes, BATCH_HEAD_BYTES)? {
            return Ok(What::Other);
        }
        let is_last = bytes[2] == BATCH_END;
        let contents = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let behind = match is_last {
            true => DIGEST_BYTES,
            false => {
                let (runs, digests) = (be16(&bytes[8..10]), be16(&bytes[10..12]));
                usize::from(runs) * RUN_BYTES + usize::from(digests) * DIGEST_BYTES + contents as usize
            }
        };
        let is_whole = more(bytes, BATCH_HEAD_BYTES + behind)?;
        Ok(if is_whole { What::Batch { channel: self.channel, is_last } } else { What::Other })
    }
}

fn record(
    bytes: &mut Vec<u8>,
    more: &mut impl FnMut(&mut Vec<u8>, usize) -> io::Result<bool>,
) -> io::Result<What> {
    if !more(bytes, RECORD_HEAD_BYTES)? {
        return Ok(What::Other);
    }
    let (kind, length) = (bytes[0], usize::from(be16(&bytes[3..])));
    let is_whole = more(bytes, RECORD_HEAD_BYTES + length)?;
    let body_bytes = length.checked_sub(SEALED_BYTES + HEADER_BYTES);
    let sealed = body_bytes.filter(|_| is_whole && kind == APPLICATION_DATA).and_then(sealed_kind);
    Ok(sealed.map_or(What::Other, What::Frame))
}

/// Which frame has a body of so many bytes, where no other has: as whoever listens on a link can tell.
fn sealed_kind(body_bytes: usize) -> Option<Kind> {
    Some(match body_bytes {
        9 => Kind::Prepare,
        10 => Kind::PageRequest,
        16 => Kind::Prepared,
        // One page, of zeros or not: what is asked for.
        21 | 4117 => Kind::Pages,
        24 => Kind::Commit,
        // The second says when the guest ran.
        25 | 53 => Kind::Running,
        // Or RECOVER, which is as long.
        32 => Kind::Query,
        35 => Kind::ChannelHello,
        108 => Kind::Progress,
        _ => return None,
    })
}

fn raw(from: &mut UnixStream, bytes: &mut Vec<u8>) -> io::Result<What> {
    bytes.resize(RAW_BYTES_MAX, 0);
    let count = io::Read::read(from, bytes)?;
    bytes.truncate(count);
    Ok(What::Other)
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use stream::frame;

    use super::*;

    fn frame_of(kind: Kind, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame::write(&mut bytes, kind, 0, body).unwrap();
        bytes
    }

    fn channel_hello(index: u16) -> Vec<u8> {
        let mut body = vec![7; 35];
        body[32..34].copy_from_slice(&index.to_be_bytes());
        frame_of(Kind::ChannelHello, &body)
    }

    fn batch(runs: u8, digests: u8, contents: u8) -> Vec<u8> {
        let mut bytes = vec![b'R', b'B', 1, 0, 0, 0, 0, 1, 0, runs, 0, digests, 0, 0, 0, contents];
        bytes.resize(16 + 16 * usize::from(runs) + 8 * usize::from(digests) + usize::from(contents), 9);
        bytes
    }

    fn record_of(kind: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![kind, 3, 3];
        bytes.extend((length as u16).to_be_bytes());
        bytes.resize(5 + length, 0);
        bytes
    }

    /// What comes out where `parts` go in, in writes of so many bytes.
    fn pieces(parts: &[Vec<u8>], at_a_time: usize) -> Vec<What> {
        let (mut to, mut from) = UnixStream::pair().unwrap();
        let all = parts.concat();
        let writer = std::thread::spawn(move || {
            all.chunks(at_a_time).for_each(|bytes| to.write_all(bytes).unwrap());
        });
        let (mut pieces, mut found) = (Pieces::default(), Vec::new());
        let mut passed = Vec::new();
        while let Some(piece) = pieces.next(&mut from).unwrap() {
            found.push(piece.what);
            passed.extend(piece.bytes);
        }
        writer.join().unwrap();
        assert_eq!(passed, parts.concat(), "all of it is carried");
        found
    }

    #[test]
    fn every_piece_is_known_however_it_comes() {
        let preamble = frame::encode_preamble().to_vec();
        let (first, last) = (false, true);
        let batch_of = |channel, is_last| What::Batch { channel, is_last };
        let mut end = vec![b'R', b'B', 2];
        end.resize(24, 0);
        for at_a_time in [1, 3, 8, 1000] {
            let link = [preamble.clone(), frame_of(Kind::Hello, &[1; 100]), frame_of(Kind::Commit, &[2; 24])];
            let found = [What::Other, What::Frame(Kind::Hello), What::Frame(Kind::Commit)];
            assert_eq!(pieces(&link, at_a_time), found);
            let channel = [preamble.clone(), channel_hello(3), batch(2, 4, 200), batch(1, 0, 0), end.clone()];
            let found = [What::Other, What::Frame(Kind::ChannelHello)];
            let batches = [batch_of(3, first), batch_of(3, first), batch_of(3, last)];
            assert_eq!(pieces(&channel, at_a_time), [&found[..], &batches].concat());
            let sealed =
                [record_of(22, 300), record_of(23, 700), record_of(23, 8 + 24 + 17), record_of(22, 49)];
            let found = [What::Other, What::Other, What::Frame(Kind::Commit), What::Other];
            assert_eq!(pieces(&sealed, at_a_time), found);
            let alert = [record_of(21, 2)];
            assert_eq!(pieces(&alert, at_a_time), [What::Other]);
        }
    }

    #[test]
    fn what_is_broken_off_or_unknown_is_carried_all_the_same() {
        let preamble = frame::encode_preamble().to_vec();
        let half = frame_of(Kind::Stream, &[3; 50])[..30].to_vec();
        assert_eq!(pieces(&[preamble.clone(), half], 1000), [What::Other; 2]);
        assert_eq!(pieces(&[preamble, vec![0xff; 8], vec![1; 100]], 1000), [What::Other; 3]);
        assert_eq!(pieces(&[b"GET / HTTP/1.1".to_vec()], 1000), [What::Other; 2]);
        assert_eq!(pieces(&[b"FR".to_vec()], 1000), [What::Other]);
    }

    #[test]
    fn descriptors_stay_with_their_frame() {
        let (mut to, mut from) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        to.write_all(&frame::encode_preamble()).unwrap();
        to.write_all(&frame_of(Kind::Stream, &[1; 10])).unwrap();
        let memory = frame_of(Kind::Memory, &[2; 10]);
        let sent = transport::Link::write_with(&mut to, &memory, &[file.as_fd(), file.as_fd()]);
        assert_eq!(sent.unwrap(), memory.len());
        drop(to);
        let mut pieces = Pieces::default();
        let mut came = Vec::new();
        while let Some(piece) = pieces.next(&mut from).unwrap() {
            came.push((piece.what, piece.descriptors.len()));
        }
        let frames = [(What::Other, 0), (What::Frame(Kind::Stream), 0), (What::Frame(Kind::Memory), 2)];
        assert_eq!(came, frames);
    }
}
