//! Reading and writing of images that are made of entries.
//!
//! ```text
//! u32 COMMON_MAGIC or SERVICE_MAGIC   (not in the inventory)
//! u32 magic of the image
//! then, until the end of the file:
//!   u32 size, size bytes of protobuf, bytes that some images put after an entry
//! ```
//! All numbers are little-endian. Which magic belongs to which name is in [`crate::magic`].

use std::io::{self, BufReader, BufWriter, Read, Write};

use prost::Message;

use crate::error::{ImageError, ImageErrorKind};
use crate::magic::{self, COMMON_MAGIC, Header, ImageKind, SERVICE_MAGIC};
use crate::store::{ImageStore, ReadSeek, WriteSeek};

/// Largest entry that is accepted, in bytes. The largest real ones, `mm` with a million mappings, take some 70 MB;
/// a decoded message may take tens of times its size, so the limit is also one on memory.
pub const MAX_ENTRY: u64 = 128 << 20;

/// Largest piece of raw bytes that [`ImageReader::extra`] returns at once. Larger ones go through
/// [`ImageReader::copy_extra`].
pub const MAX_EXTRA: u64 = 1 << 30;

/// Writes an image that has just one entry.
///
/// # Errors
/// When `name` is no image made of entries, or writing fails.
pub fn write_one<M: Message>(store: &dyn ImageStore, name: &str, message: &M) -> Result<(), ImageError> {
    let mut writer = ImageWriter::create(store, name)?;
    writer.write(message)?;
    writer.finish()
}

/// Reads the first entry of an image.
///
/// # Errors
/// When the image is missing ([`ImageError::is_not_found`]), damaged or has no entry.
pub fn read_one<M: Message + Default>(store: &dyn ImageStore, name: &str) -> Result<M, ImageError> {
    ImageReader::open(store, name)?.required()
}

/// Reads all entries of an image that has nothing between its entries.
///
/// # Errors
/// When the image is missing ([`ImageError::is_not_found`]) or damaged.
pub fn read_all<M: Message + Default>(store: &dyn ImageStore, name: &str) -> Result<Vec<M>, ImageError> {
    let mut reader = ImageReader::open(store, name)?;
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        entries.push(entry);
    }
    Ok(entries)
}

/// Writes an image, entry after entry. Call [`ImageWriter::finish`]: without it, errors go unnoticed.
pub struct ImageWriter<W: Write = Box<dyn WriteSeek + Send>> {
    name: String,
    output: BufWriter<W>,
    offset: u64,
}

impl ImageWriter {
    /// Makes the file `name` in `store` and writes its magics.
    ///
    /// # Errors
    /// When `name` is no image made of entries, or the file cannot be made.
    pub fn create(store: &dyn ImageStore, name: &str) -> Result<Self, ImageError> {
        let kind = kind_of(name)?;
        let output = store
            .create(name)
            .map_err(|error| ImageError::new(name, 0, ImageErrorKind::Io(error)))?;
        Self::start(kind, name, output)
    }
}

impl<W: Write> ImageWriter<W> {
    /// Writes the magics of the image `name` to `output`.
    ///
    /// # Errors
    /// As [`ImageWriter::create`].
    pub fn new(name: &str, output: W) -> Result<Self, ImageError> {
        Self::start(kind_of(name)?, name, output)
    }

    fn start(kind: &ImageKind, name: &str, output: W) -> Result<Self, ImageError> {
        let mut writer = Self {
            name: name.to_owned(),
            output: BufWriter::new(output),
            offset: 0,
        };
        if let Some(magic) = outer_magic(kind) {
            writer.put(&magic.to_le_bytes())?;
        }
        writer.put(&kind.magic.to_le_bytes())?;
        Ok(writer)
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// When writing fails, or the entry is larger than [`MAX_ENTRY`]: no reader would take it.
    pub fn write<M: Message>(&mut self, message: &M) -> Result<(), ImageError> {
        let bytes = message.encode_to_vec();
        let size = bytes.len() as u64;
        let checked = u32::try_from(size).ok().filter(|_| size <= MAX_ENTRY);
        let Some(length) = checked else {
            return Err(self.error(ImageErrorKind::TooLarge { size, limit: MAX_ENTRY }));
        };
        self.put(&length.to_le_bytes())?;
        self.put(&bytes)
    }

    /// Writes raw bytes, which belong to the entry before them.
    ///
    /// # Errors
    /// When writing fails.
    pub fn extra(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.put(bytes)
    }

    /// Writes raw bytes and then zeros up to a multiple of `align` (at most 64) bytes.
    ///
    /// # Errors
    /// When writing fails.
    pub fn padded_extra(&mut self, bytes: &[u8], align: usize) -> Result<(), ImageError> {
        self.put(bytes)?;
        let padding = bytes.len().next_multiple_of(align) - bytes.len();
        self.put(&[0; 64][..padding])
    }

    /// Writes all that `source` gives as raw bytes; returns how many these were.
    ///
    /// # Errors
    /// When reading or writing fails.
    pub fn extra_from(&mut self, source: &mut dyn Read) -> Result<u64, ImageError> {
        let copied = io::copy(source, &mut self.output).map_err(|error| self.error(ImageErrorKind::Io(error)))?;
        self.offset += copied;
        Ok(copied)
    }

    /// Bytes written so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Writes out what is still buffered.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> Result<(), ImageError> {
        self.output
            .flush()
            .map_err(|error| self.error(ImageErrorKind::Io(error)))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.output
            .write_all(bytes)
            .map_err(|error| self.error(ImageErrorKind::Io(error)))?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn error(&self, kind: ImageErrorKind) -> ImageError {
        ImageError::new(&self.name, self.offset, kind)
    }
}

/// Reads an image, entry after entry.
///
/// The file is not trusted. Memory is taken as bytes arrive, never because a size field says so.
pub struct ImageReader<R: Read = Box<dyn ReadSeek + Send>> {
    name: String,
    input: BufReader<R>,
    offset: u64,
    limit: u64,
}

impl ImageReader {
    /// Opens the file `name` in `store` and checks its magics.
    ///
    /// # Errors
    /// When `name` is no image made of entries, the file is missing ([`ImageError::is_not_found`]) or starts
    /// with other magics.
    pub fn open(store: &dyn ImageStore, name: &str) -> Result<Self, ImageError> {
        let kind = kind_of(name)?;
        let input = store
            .open(name)
            .map_err(|error| ImageError::new(name, 0, ImageErrorKind::Io(error)))?;
        Self::start(kind, name, input)
    }
}

impl<R: Read> ImageReader<R> {
    /// Checks that `input` starts with the magics of the image `name`.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn new(name: &str, input: R) -> Result<Self, ImageError> {
        Self::start(kind_of(name)?, name, input)
    }

    fn start(kind: &ImageKind, name: &str, input: R) -> Result<Self, ImageError> {
        let mut reader = Self {
            name: name.to_owned(),
            input: BufReader::new(input),
            offset: 0,
            limit: MAX_ENTRY,
        };
        if let Some(magic) = outer_magic(kind) {
            reader.expect_magic(magic)?;
        }
        reader.expect_magic(kind.magic)?;
        Ok(reader)
    }

    /// Accepts entries of up to `bytes` instead of [`MAX_ENTRY`].
    pub fn with_limit(self, bytes: u64) -> Self {
        Self { limit: bytes, ..self }
    }

    /// The next entry, `None` at the end of the file.
    ///
    /// # Errors
    /// When reading fails, the file ends inside the entry, or the entry is too large or not an `M`.
    // An iterator would have to fix the type of the entries, which in some images changes from one to the next.
    #[allow(clippy::should_implement_trait)]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let start = self.offset;
        let header = self.up_to(4)?;
        if header.is_empty() {
            return Ok(None);
        }
        let Ok(header) = <[u8; 4]>::try_from(header.as_slice()) else {
            return Err(self.truncated(start, 4));
        };
        let size = u64::from(u32::from_le_bytes(header));
        if size > self.limit {
            return Err(self.error_at(
                start,
                ImageErrorKind::TooLarge {
                    size,
                    limit: self.limit,
                },
            ));
        }
        let bytes = self.exactly(size)?;
        let entry = M::decode(bytes.as_slice());
        entry
            .map(Some)
            .map_err(|error| self.error_at(start, ImageErrorKind::Decode(error)))
    }

    /// The next entry, which must be there.
    ///
    /// # Errors
    /// As [`ImageReader::next`], and at the end of the file.
    pub fn required<M: Message + Default>(&mut self) -> Result<M, ImageError> {
        self.next()?
            .ok_or_else(|| self.error_at(self.offset, ImageErrorKind::NoEntry))
    }

    /// The next `size` raw bytes.
    ///
    /// # Errors
    /// When reading fails, the file ends before, or `size` exceeds [`MAX_EXTRA`].
    pub fn extra(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        if size > MAX_EXTRA {
            return Err(self.error_at(self.offset, ImageErrorKind::TooLarge { size, limit: MAX_EXTRA }));
        }
        self.exactly(size)
    }

    /// The next `size` raw bytes, and past the padding that brings them to a multiple of `align` bytes.
    ///
    /// # Errors
    /// As [`ImageReader::extra`].
    pub fn padded_extra(&mut self, size: u64, align: u64) -> Result<Vec<u8>, ImageError> {
        let bytes = self.extra(size)?;
        self.exactly(size.next_multiple_of(align) - size)?;
        Ok(bytes)
    }

    /// Copies the next `size` raw bytes to `target`; any size will do.
    ///
    /// # Errors
    /// When reading or writing fails, or the file ends before.
    pub fn copy_extra(&mut self, size: u64, target: &mut dyn Write) -> Result<(), ImageError> {
        let start = self.offset;
        let copied = io::copy(&mut (&mut self.input).take(size), target);
        self.offset += copied.map_err(|error| self.error_at(start, ImageErrorKind::Io(error)))?;
        if self.offset - start < size {
            Err(self.truncated(start, size))
        } else {
            Ok(())
        }
    }

    /// Copies all that is left to `target`, as raw bytes; returns how many these were.
    ///
    /// # Errors
    /// When reading or writing fails.
    pub fn copy_rest(&mut self, target: &mut dyn Write) -> Result<u64, ImageError> {
        let copied = io::copy(&mut self.input, target);
        let copied = copied.map_err(|error| self.error_at(self.offset, ImageErrorKind::Io(error)))?;
        self.offset += copied;
        Ok(copied)
    }

    /// Passes over the next `size` raw bytes.
    ///
    /// # Errors
    /// When reading fails or the file ends before.
    pub fn skip(&mut self, size: u64) -> Result<(), ImageError> {
        self.copy_extra(size, &mut io::sink())
    }

    /// Bytes read so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// An error in this image, at the current place.
    pub fn error(&self, kind: ImageErrorKind) -> ImageError {
        self.error_at(self.offset, kind)
    }

    fn expect_magic(&mut self, expected: u32) -> Result<(), ImageError> {
        let start = self.offset;
        let bytes = self.up_to(4)?;
        let Ok(bytes) = <[u8; 4]>::try_from(bytes.as_slice()) else {
            return Err(self.truncated(start, 4));
        };
        let found = u32::from_le_bytes(bytes);
        if found == expected {
            Ok(())
        } else {
            Err(self.error_at(start, ImageErrorKind::WrongMagic { expected, found }))
        }
    }

    fn exactly(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        let start = self.offset;
        let bytes = self.up_to(size)?;
        if (bytes.len() as u64) < size {
            Err(self.truncated(start, size))
        } else {
            Ok(bytes)
        }
    }

    /// Fewer bytes at the end of the file. The buffer grows with what arrives, whatever `size` says.
    fn up_to(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::with_capacity(size.min(64 << 10) as usize);
        let result = (&mut self.input).take(size).read_to_end(&mut bytes);
        result.map_err(|error| self.error_at(self.offset, ImageErrorKind::Io(error)))?;
        self.offset += bytes.len() as u64;
        Ok(bytes)
    }

    /// To be called after a short read that began at `start`.
    fn truncated(&self, start: u64, wanted: u64) -> ImageError {
        self.error_at(
            start,
            ImageErrorKind::Truncated {
                wanted,
                available: self.offset - start,
            },
        )
    }

    fn error_at(&self, offset: u64, kind: ImageErrorKind) -> ImageError {
        ImageError::new(&self.name, offset, kind)
    }
}

fn kind_of(name: &str) -> Result<&'static ImageKind, ImageError> {
    let (kind, _) = magic::by_name(name).ok_or_else(|| ImageError::new(name, 0, ImageErrorKind::UnknownImage))?;
    match kind.header {
        Header::Raw => Err(ImageError::new(name, 0, ImageErrorKind::RawImage)),
        _ => Ok(kind),
    }
}

fn outer_magic(kind: &ImageKind) -> Option<u32> {
    match kind.header {
        Header::Common => Some(COMMON_MAGIC),
        Header::Service => Some(SERVICE_MAGIC),
        Header::OwnOnly | Header::Raw => None,
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use proptest::prelude::*;

    use super::*;
    use crate::proto;
    use crate::store::MemStore;

    fn image(name: &str, build: impl FnOnce(&mut ImageWriter)) -> Vec<u8> {
        let store = MemStore::new();
        let mut writer = ImageWriter::create(&store, name).unwrap();
        build(&mut writer);
        writer.finish().unwrap();
        store.take(name).unwrap()
    }

    fn pstree() -> proto::PstreeEntry {
        proto::PstreeEntry {
            pid: 30495,
            ppid: 0,
            pgid: 30495,
            sid: 30495,
            threads: vec![30495, 30497],
            exit_signal: None,
        }
    }

    fn pipe(bytes: u32) -> proto::PipeDataEntry {
        proto::PipeDataEntry {
            pipe_id: 1887985,
            bytes,
            size: Some(65536),
            packets: Vec::new(),
        }
    }

    #[test]
    fn each_kind_of_image_starts_with_its_magics() {
        let pstree = image("pstree.img", |_| ());
        assert_eq!(pstree, [0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50]);
        let inventory = image("inventory.img", |_| ());
        assert_eq!(inventory, [0x16, 0x31, 0x31, 0x58]);
        let stats = image("stats-dump", |_| ());
        assert_eq!(stats, [0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57]);
    }

    #[test]
    fn raw_and_unknown_names_are_refused() {
        let store = MemStore::new();
        for name in ["pages-1.img", "nonsense", "../core-1.img"] {
            assert!(ImageWriter::create(&store, name).is_err(), "{name}");
            assert!(ImageReader::open(&store, name).is_err(), "{name}");
        }
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn entries_and_the_bytes_between_them_come_back() {
        let store = MemStore::new();
        let mut writer = ImageWriter::create(&store, "pipes-data.img").unwrap();
        for text in ["in the pipe", "", "x"] {
            writer.write(&pipe(text.len() as u32)).unwrap();
            writer.padded_extra(text.as_bytes(), 8).unwrap();
        }
        let length = writer.offset();
        writer.finish().unwrap();
        assert_eq!(length, store.size());

        let mut reader = ImageReader::open(&store, "pipes-data.img").unwrap();
        let mut texts = Vec::new();
        while let Some(entry) = reader.next::<proto::PipeDataEntry>().unwrap() {
            texts.push(String::from_utf8(reader.padded_extra(entry.bytes.into(), 8).unwrap()).unwrap());
        }
        assert_eq!(texts, ["in the pipe", "", "x"]);
        assert_eq!(reader.offset(), length);
    }

    #[test]
    fn large_extras_are_copied_without_being_held() {
        let contents = vec![7; 3 << 20];
        let bytes = image("ghost-file-1f.img", |writer| {
            writer.write(&proto::GhostFileEntry::default()).unwrap();
            assert_eq!(writer.extra_from(&mut contents.as_slice()).unwrap(), 3 << 20);
        });
        let mut reader = ImageReader::new("ghost-file-1f.img", bytes.as_slice()).unwrap();
        reader.required::<proto::GhostFileEntry>().unwrap();
        reader.skip(5).unwrap();
        let mut copy = Vec::new();
        reader.copy_extra(10, &mut copy).unwrap();
        assert_eq!(reader.copy_rest(&mut copy).unwrap(), (3 << 20) - 15);
        assert_eq!(copy, contents[5..]);
        assert!(reader.skip(1).is_err());
    }

    #[test]
    fn an_error_names_the_image_the_place_and_the_cause() {
        let store = MemStore::new();
        let missing = read_one::<proto::PstreeEntry>(&store, "pstree.img").unwrap_err();
        assert!(missing.is_not_found());
        assert_eq!(io::Error::from(missing).kind(), io::ErrorKind::NotFound);

        store.insert("pstree.img", image("core-1.img", |_| ())).unwrap();
        let wrong = read_one::<proto::PstreeEntry>(&store, "pstree.img").unwrap_err();
        assert_eq!(
            wrong.to_string(),
            "pstree.img at byte 4: magic 0x55053847 instead of 0x50273030 (this is an image of kind CORE)"
        );

        let mut bytes = image("pstree.img", |writer| writer.write(&pstree()).unwrap());
        bytes.extend(u32::MAX.to_le_bytes());
        let start = bytes.len() as u64 - 4;
        store.insert("pstree.img", bytes).unwrap();
        let huge = read_all::<proto::PstreeEntry>(&store, "pstree.img").unwrap_err();
        assert_eq!(huge.offset, start);
        assert!(matches!(
            huge.kind,
            ImageErrorKind::TooLarge {
                size: 0xffff_ffff,
                limit: MAX_ENTRY
            }
        ));

        store
            .insert(
                "pstree.img",
                image("pstree.img", |writer| writer.extra(&[1, 0, 0, 0, 0xff]).unwrap()),
            )
            .unwrap();
        let damaged = read_one::<proto::PstreeEntry>(&store, "pstree.img").unwrap_err();
        assert_eq!(damaged.to_string(), "pstree.img at byte 8: the entry is damaged");
        assert!(damaged.source().unwrap().is::<prost::DecodeError>());

        store.insert("pstree.img", image("pstree.img", |_| ())).unwrap();
        let empty = read_one::<proto::PstreeEntry>(&store, "pstree.img").unwrap_err();
        assert_eq!(empty.to_string(), "pstree.img at byte 8: the file has no entry here");
    }

    #[test]
    fn a_huge_size_takes_no_memory_before_the_bytes_arrive() {
        let bytes = image("pstree.img", |writer| {
            writer.extra(&(MAX_ENTRY as u32).to_le_bytes()).unwrap()
        });
        let mut reader = ImageReader::new("pstree.img", bytes.as_slice()).unwrap();
        let error = reader.next::<proto::PstreeEntry>().unwrap_err();
        assert!(matches!(
            error.kind,
            ImageErrorKind::Truncated {
                wanted: MAX_ENTRY,
                available: 0
            }
        ));
        let mut reader = ImageReader::new("pstree.img", bytes.as_slice()).unwrap();
        assert!(matches!(
            reader.extra(MAX_EXTRA).unwrap_err().kind,
            ImageErrorKind::Truncated { .. }
        ));
        assert!(matches!(
            reader.extra(u64::MAX).unwrap_err().kind,
            ImageErrorKind::TooLarge { .. }
        ));
    }

    #[test]
    fn every_truncation_is_noticed_unless_it_is_between_entries() {
        let mut ends = vec![8];
        let bytes = image("pstree.img", |writer| {
            for _ in 0..3 {
                writer.write(&pstree()).unwrap();
                ends.push(writer.offset());
            }
        });
        for length in 0..=bytes.len() {
            let store = MemStore::new();
            store.insert("pstree.img", bytes[..length].to_vec()).unwrap();
            let result = read_all::<proto::PstreeEntry>(&store, "pstree.img");
            match ends.iter().position(|&end| end == length as u64) {
                Some(count) => assert_eq!(result.unwrap(), vec![pstree(); count]),
                None => {
                    let error = result.unwrap_err();
                    assert!(
                        matches!(error.kind, ImageErrorKind::Truncated { .. }),
                        "{length}: {error}"
                    );
                    assert!(error.offset <= length as u64);
                }
            }
        }
    }

    #[test]
    fn the_wire_format_agrees_with_crius_field_numbers() {
        // What CRIU 4.2 wrote for {"vaddr": "0x41f000", "compat_nr_pages": 0, "flags": "PE_PRESENT", "nr_pages": 1}.
        let entry = proto::PagemapEntry {
            vaddr: 0x41f000,
            flags: Some(4),
            nr_pages: Some(1),
            ..Default::default()
        };
        assert_eq!(
            entry.encode_to_vec(),
            [0x08, 0x80, 0xe0, 0x87, 0x02, 0x10, 0x00, 0x20, 0x04, 0x28, 0x01]
        );
        // An inventory with {"img_version": 2, "fdinfo_per_id": true, "ns_per_id": true, "lsmtype": "NO_LSM"}.
        let bytes = [0x08, 2, 0x10, 1, 0x20, 1, 0x30, 0];
        let inventory = proto::InventoryEntry::decode(bytes.as_slice()).unwrap();
        assert_eq!((inventory.img_version, inventory.fdinfo_per_id), (2, Some(true)));
        assert_eq!(
            (inventory.ns_per_id, inventory.lsmtype()),
            (Some(true), proto::Lsmtype::NoLsm)
        );
        // Defaults that are not zero.
        assert_eq!(proto::RegFileEntry::default().mnt_id(), -1);
        assert_eq!(proto::PacketSockEntry::default().fanout(), u32::MAX);
        assert!(proto::UserDescT::default().seg_not_present);
    }

    proptest! {
        #[test]
        fn any_entries_come_back(
            entries in prop::collection::vec((any::<u32>(), any::<u64>(), ".*", any::<Option<bool>>()), 0..8),
        ) {
            let entries: Vec<_> = entries
                .into_iter()
                .map(|(id, pos, name, ext)| proto::RegFileEntry { id, pos, name, ext, ..Default::default() })
                .collect();
            let store = MemStore::new();
            let mut writer = ImageWriter::create(&store, "reg-files.img").unwrap();
            for entry in &entries {
                writer.write(entry).unwrap();
            }
            writer.finish().unwrap();
            prop_assert_eq!(read_all::<proto::RegFileEntry>(&store, "reg-files.img").unwrap(), entries);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let store = MemStore::new();
            let mut image = image("core-1.img", |_| ());
            image.extend(&bytes);
            store.insert("core-1.img", image).unwrap();
            store.insert("mm-1.img", bytes).unwrap();
            let _ = read_all::<proto::CoreEntry>(&store, "core-1.img");
            prop_assert!(read_all::<proto::MmEntry>(&store, "mm-1.img").is_err());
        }
    }
}
