//! What a dump and a page server tell each other about chains: see `whimbrel::dump::track::chain`.
//!
//! The page server has the images, and so the marks of the dump before; the dump asks for them before it freezes the tree,
//! and tells its own when all pages are sent.

use std::io;

use prost::Message as _;
use whimbrel_images::page::MemoryObject;
use whimbrel_images::proto::TrackEntry;

/// A message, in either direction.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Marks {
    /// Asks for the marks of the dump before.
    #[prost(bool, tag = "1")]
    pub ask: bool,
    /// The marks.
    #[prost(message, repeated, tag = "2")]
    pub marks: Vec<Mark>,
}

/// The mark of one task.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mark {
    /// The task, as images call it.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// Its mark.
    #[prost(message, optional, tag = "2")]
    pub track: Option<TrackEntry>,
}

impl Marks {
    /// A question.
    pub fn question() -> Marks {
        Marks {
            ask: true,
            marks: Vec::new(),
        }
    }

    /// Marks to be told.
    pub fn tell<'a>(marks: impl Iterator<Item = (MemoryObject, &'a TrackEntry)>) -> Marks {
        let of_task = |(object, track): (MemoryObject, &TrackEntry)| match object {
            MemoryObject::Task(pid) => Some(Mark {
                pid,
                track: Some(track.clone()),
            }),
            MemoryObject::Shmem(_) => None,
        };
        Marks {
            ask: false,
            marks: marks.filter_map(of_task).collect(),
        }
    }

    /// The marks, by object.
    pub fn into_tracks(self) -> impl Iterator<Item = (MemoryObject, TrackEntry)> {
        let track = |mark: Mark| Some((MemoryObject::Task(mark.pid), mark.track?));
        self.marks.into_iter().filter_map(track)
    }

    /// From the wire.
    ///
    /// # Errors
    /// When it is not such a message.
    pub fn read(body: &[u8]) -> io::Result<Marks> {
        Marks::decode(body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}
