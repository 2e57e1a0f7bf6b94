//! Frames of the control stream: a little-endian 32-bit length, then one encoded [`Control`].

use bytes::{Buf, BytesMut};
use prost::Message as _;

use super::{ProtocolError, wire::Control};

/// Largest application message in bytes.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Largest frame in bytes: an application message and what is around it.
pub const MAX_FRAME: usize = MAX_MESSAGE + 4096;

/// Encodes a control message as one frame.
pub fn encode(control: &Control) -> Vec<u8> {
    let length = control.encoded_len();
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&(length as u32).to_le_bytes());
    control.encode(&mut frame).expect("a Vec grows as needed");
    frame
}

/// Cuts a byte stream into control messages.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: BytesMut,
}

impl FrameReader {
    /// Takes the next bytes of the stream, however they were cut.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message, if there is one.
    ///
    /// # Errors
    /// When the length is over [`MAX_FRAME`] or the message does not parse; the stream is unusable then.
    pub fn next_frame(&mut self) -> Result<Option<Control>, ProtocolError> {
        let Some(prefix) = self.buffer.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > MAX_FRAME {
            return Err(ProtocolError::FrameTooLong {
                length,
                limit: MAX_FRAME,
            });
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        self.buffer.advance(4);
        let body = self.buffer.split_to(length).freeze();
        Control::decode(body).map(Some).map_err(ProtocolError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::wire::{Applied, control::Kind};

    #[test]
    fn frames_survive_any_cut_of_the_stream() {
        let control = Control {
            kind: Some(Kind::Applied(Applied { sequence: 7 })),
        };
        let bytes = [encode(&control), encode(&control)].concat();
        let mut reader = FrameReader::default();
        let mut seen = 0;
        for byte in bytes {
            reader.push(&[byte]);
            while let Some(frame) = reader.next_frame().unwrap() {
                assert_eq!(frame, control);
                seen += 1;
            }
        }
        assert_eq!(seen, 2);
    }

    #[test]
    fn a_length_over_the_bound_is_refused_before_anything_is_held() {
        let mut reader = FrameReader::default();
        reader.push(&u32::MAX.to_le_bytes());
        assert!(matches!(reader.next_frame(), Err(ProtocolError::FrameTooLong { .. })));
    }

    #[test]
    fn unknown_fields_and_kinds_are_skipped() {
        // Field 900, wire type 2, three bytes: a kind from the future.
        let mut body = Vec::new();
        prost::encoding::encode_key(900, prost::encoding::WireType::LengthDelimited, &mut body);
        body.extend_from_slice(&[3, 1, 2, 3]);
        let mut reader = FrameReader::default();
        reader.push(&(body.len() as u32).to_le_bytes());
        reader.push(&body);
        assert_eq!(reader.next_frame().unwrap(), Some(Control { kind: None }));
    }
}
