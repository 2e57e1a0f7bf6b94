//! What can be wrong with an image, and where.

use std::error::Error;
use std::fmt;
use std::io;

/// An image file that could not be read or written: which, where in it, and why.
#[derive(Debug)]
pub struct ImageError {
    /// Name of the file.
    pub image: String,
    /// Bytes from the beginning of the file.
    pub offset: u64,
    /// What is wrong there.
    pub kind: ImageErrorKind,
}

/// What is wrong with an image.
#[derive(Debug)]
#[non_exhaustive]
pub enum ImageErrorKind {
    /// Opening, reading or writing failed.
    Io(io::Error),
    /// The name belongs to no image, so its magic is not known.
    UnknownImage,
    /// The image is raw: it has neither magic nor entries.
    RawImage,
    /// Another magic than the image must have.
    WrongMagic {
        /// The magic of the image.
        expected: u32,
        /// What is there.
        found: u32,
    },
    /// The file ends inside something.
    Truncated {
        /// Bytes that belong there.
        wanted: u64,
        /// Bytes that are there.
        available: u64,
    },
    /// The file has no entry where there must be one.
    NoEntry,
    /// Something is larger than the limit.
    TooLarge {
        /// Bytes.
        size: u64,
        /// Bytes.
        limit: u64,
    },
    /// An entry is not the protobuf message that it should be.
    Decode(prost::DecodeError),
    /// A pagemap that contradicts itself or its pages file.
    Pagemap(String),
    /// The chain of parent directories is too long or leads back to itself.
    ParentChain(String),
}

impl ImageError {
    /// An error of `kind` in the file `image` at `offset` bytes.
    pub fn new(image: impl Into<String>, offset: u64, kind: ImageErrorKind) -> Self {
        Self {
            image: image.into(),
            offset,
            kind,
        }
    }

    /// Whether the file does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(&self.kind, ImageErrorKind::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}: {}", self.image, self.offset, self.kind)
    }
}

impl fmt::Display for ImageErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The sources of these two say the rest.
            Self::Io(_) => write!(f, "input or output failed"),
            Self::Decode(_) => write!(f, "the entry is damaged"),
            Self::UnknownImage => write!(f, "no image is called like this"),
            Self::RawImage => write!(f, "the image is raw and has no entries"),
            Self::WrongMagic { expected, found } => {
                write!(f, "magic {found:#010x} instead of {expected:#010x}")?;
                match crate::magic::by_magic(*found).next() {
                    Some(kind) => write!(f, " (this is an image of kind {})", kind.image),
                    None => Ok(()),
                }
            }
            Self::Truncated { wanted, available } => {
                write!(f, "the file ends after {available} of {wanted} bytes")
            }
            Self::NoEntry => write!(f, "the file has no entry here"),
            Self::TooLarge { size, limit } => write!(f, "size of {size} bytes exceeds the limit of {limit}"),
            Self::Pagemap(what) | Self::ParentChain(what) => write!(f, "{what}"),
        }
    }
}

impl Error for ImageError {
    // The kind is part of this error's own message, so the chain goes on below it.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.kind {
            ImageErrorKind::Io(error) => Some(error),
            ImageErrorKind::Decode(error) => Some(error),
            _ => None,
        }
    }
}

impl From<ImageError> for io::Error {
    fn from(error: ImageError) -> Self {
        let kind = match &error.kind {
            ImageErrorKind::Io(source) => source.kind(),
            ImageErrorKind::Truncated { .. } => io::ErrorKind::UnexpectedEof,
            ImageErrorKind::UnknownImage | ImageErrorKind::RawImage => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}
