//! The page protocol: frames, as bytes.
//!
//! # Frame
//!
//! ```text
//! magic u32 "RPGE" | version u8 | kind u8 | flags u16 (0) | payload length u32 (<= 1 MiB) | request u32 | payload
//! ```
//!
//! All numbers are little endian. A request number is chosen by the asker and repeated in every answer; 0 where there is
//! no request. The frames of a connection, in order:
//!
//! ```text
//! asker                                   source
//! Hello {family, version, host}     ->
//!                                   <-    HelloAck {version, host}, or Error {Version | Family} and the end
//! OpenLayer {handle, layer}         ->                                             (once for each layer)
//!                                   <-    LayerOpened {handle, status}
//! GetPages {handle, start, count}   ->                                             (any number under way)
//!                                   <-    Pages {handle, last: false} ..., Pages {handle, last: true}
//! Ping                              <->   Pong
//! ```
//!
//! [`Message::Error`] with the request's number answers one request; with number 0 it is about the connection, which
//! then ends. Answers may come in any order.
//!
//! # Pages
//!
//! ```text
//! handle u32 | entries u16 | last u8 | 0 u8 | data of the entries, in order | table of the entries
//! table entry: page u64 | checksum u64 | length u16 | encoding u8 | 0 u8
//! ```
//!
//! The data of neighbouring raw pages lie side by side, so that a receiver writes a run with one call
//! ([`Pages::runs`]).

use ramet_memory::{FamilyId, LayerId, PAGE_SIZE, PageIndex, PageRun, page_checksum};
use std::fmt;

/// The first four bytes of every frame: `RPGE`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"RPGE");
/// The version of the protocol that this release speaks.
pub const VERSION: u8 = 1;
/// Bytes before the payload.
pub const HEADER_LEN: usize = 16;
/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Most pages that one [`Message::GetPages`] may ask for.
pub const MAX_PAGES_PER_REQUEST: u16 = 512;
/// Most bytes of a host's name and of an error's message.
pub const MAX_TEXT: usize = 255;
/// Most entries of one [`Message::Pages`].
pub const MAX_ENTRIES: usize = 4096;

const PAGES_HEAD: usize = 8;
const TABLE_ENTRY: usize = 20;

/// Bytes that are no frame, or a page that is not what it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The bytes do not begin with [`MAGIC`].
    #[error("Peer does not speak the Ramet page protocol (first bytes {found:#010x}): check address and port")]
    Magic {
        /// What stood in its place.
        found: u32,
    },
    /// Another version of the protocol.
    #[error(
        "Peer speaks version {found} of the page protocol, this ramet speaks version {VERSION}: install the same ramet release on both hosts"
    )]
    Version {
        /// The peer's version.
        found: u8,
    },
    /// A kind of frame that does not exist in this version.
    #[error("Peer sent a frame of unknown kind {kind}: install the same ramet release on both hosts")]
    Kind {
        /// The number found.
        kind: u8,
    },
    /// A frame beyond the limit.
    #[error(
        "Peer announced a frame of {len} bytes, the limit is {MAX_PAYLOAD}: the connection is damaged or the peer is no ramet"
    )]
    TooLong {
        /// Payload bytes announced.
        len: u32,
    },
    /// A frame whose inside makes no sense.
    #[error("Peer sent a malformed {message} frame: {what}")]
    Malformed {
        /// The kind of frame.
        message: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// The bytes are not those that this page of this layer had when it was copied out of its parent.
    #[error("Page {} of layer {layer} arrived damaged or misplaced (checksum {found:016x}, expected {expected:016x}): it was dropped; ask again or ask another source", page.0)]
    Checksum {
        /// The layer.
        layer: LayerId,
        /// The page.
        page: PageIndex,
        /// The checksum in the entry.
        expected: u64,
        /// The checksum of the bytes.
        found: u64,
    },
    /// A packed page that does not unpack to 4096 bytes.
    #[error("Page {} of layer {layer} arrived damaged (it does not unpack): it was dropped; ask again or ask another source", page.0)]
    Packing {
        /// The layer.
        layer: LayerId,
        /// The page.
        page: PageIndex,
    },
    /// The source does not hold the page, so there are no bytes to unpack.
    #[error("Page {} of layer {layer} is not held by this source: ask another source", page.0)]
    Absent {
        /// The layer.
        layer: LayerId,
        /// The page.
        page: PageIndex,
    },
}

/// How urgent a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Priority {
    /// A guest's CPU waits for it.
    Demand = 0,
    /// Fetched ahead.
    Prefetch = 1,
}

/// How the bytes of a page travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// As they are: 4096 bytes.
    Raw = 0,
    /// All zeros: no bytes.
    Zero = 1,
    /// One LZ4 block, shorter than 4096 bytes.
    Lz4 = 2,
    /// The source does not hold the page, or the layer does not own it: no bytes, checksum 0.
    Absent = 3,
}

/// Why a request or a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The peer's version is not spoken here.
    Version = 1,
    /// The family is not served here.
    Family = 2,
    /// The handle was not opened, or the layer is gone.
    Layer = 3,
    /// The frame was malformed.
    Malformed = 4,
    /// Too much is under way: wait and ask again.
    Busy = 5,
    /// The source failed (its disk, its memory).
    Internal = 6,
    /// The source is going away.
    ShuttingDown = 7,
    /// The page cannot be served intact: what the source holds fails its checksum.
    Damaged = 8,
}

/// The answer to [`Message::OpenLayer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum LayerStatus {
    /// Open: ask for pages.
    Ok = 0,
    /// The source does not know this layer.
    Unknown = 1,
    /// The layer belongs to another family.
    OtherFamily = 2,
    /// Too many layers are open on this connection.
    TooMany = 3,
}

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message<'a> {
    /// The asker's first frame.
    Hello {
        /// The family whose pages it wants.
        family: FamilyId,
        /// The version of the protocol that it speaks.
        version: u8,
        /// Its host's name, at most [`MAX_TEXT`] bytes.
        host: &'a str,
    },
    /// The source's first frame.
    HelloAck {
        /// The version of the protocol that it speaks.
        version: u8,
        /// Its host's name, at most [`MAX_TEXT`] bytes.
        host: &'a str,
    },
    /// Gives a layer a short name on this connection.
    OpenLayer {
        /// The short name, chosen by the asker.
        handle: u32,
        /// The layer.
        layer: LayerId,
    },
    /// Answers [`Message::OpenLayer`].
    LayerOpened {
        /// The short name.
        handle: u32,
        /// Whether it can be used.
        status: LayerStatus,
    },
    /// Asks for consecutive pages of a layer.
    GetPages {
        /// The layer's short name.
        handle: u32,
        /// The first page.
        start: PageIndex,
        /// How many, 1 to [`MAX_PAGES_PER_REQUEST`].
        count: u16,
        /// How urgent it is.
        priority: Priority,
    },
    /// Answers [`Message::GetPages`], in one frame or several.
    Pages(Pages<'a>),
    /// A request or the connection failed.
    Error {
        /// Why.
        code: ErrorCode,
        /// The same for people, at most [`MAX_TEXT`] bytes.
        message: &'a str,
    },
    /// Are you there?
    Ping {
        /// Comes back in the answer.
        token: u64,
    },
    /// Answers [`Message::Ping`].
    Pong {
        /// The question's token.
        token: u64,
    },
}

/// One frame: a message and the request that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The request's number; 0 where there is none.
    pub req: u32,
    /// What the frame says.
    pub message: Message<'a>,
}

/// The pages of one [`Message::Pages`] frame. Checked when the frame was decoded: iterating cannot fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// The layer's short name.
    pub handle: u32,
    /// Whether this is the last frame of the answer.
    pub last: bool,
    data: &'a [u8],
    table: &'a [u8],
}

/// One page of a [`Pages`] frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageEntry<'a> {
    /// The page.
    pub page: PageIndex,
    /// How its bytes travel.
    pub encoding: Encoding,
    /// Its [`page_checksum`]; 0 when absent.
    pub checksum: u64,
    /// The bytes that travelled: 4096 when raw, none when zero or absent.
    pub data: &'a [u8],
}

/// A run of consecutive pages of a [`Pages`] frame whose bytes travelled alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRun<'a> {
    /// The pages.
    pub pages: PageRun,
    /// How their bytes travelled. [`Encoding::Lz4`] runs are one page long.
    pub encoding: Encoding,
    /// Raw: the bytes of all pages, side by side. Lz4: the block. Otherwise empty.
    pub data: &'a [u8],
    entries: Pages<'a>,
}

/// The frame holds as many pages as fit: [`PagesWriter::finish`] it, send it, start the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The Pages frame is full: finish and send it, then start the next one")]
pub struct PagesFull;

mod decode;
mod writer;

pub use writer::PagesWriter;

impl<'a> Pages<'a> {
    /// Number of pages in the frame.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.table.len() / TABLE_ENTRY
    }

    /// Whether the frame holds no page.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The pages, in the order in which they were sent.
    pub fn iter(&self) -> impl Iterator<Item = PageEntry<'a>> + use<'a> {
        decode::Entries { data: self.data, table: self.table }
    }

    /// The same, with neighbours joined: consecutive raw, zero or absent pages become one run, so that a receiver can
    /// write all their bytes with one call. The checksums of a run are checked by [`EntryRun::verify`].
    pub fn runs(&self) -> impl Iterator<Item = EntryRun<'a>> + use<'a> {
        decode::Runs { rest: *self }
    }
}

impl fmt::Debug for Pages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.iter().next().map(|e| e.page);
        f.debug_struct("Pages")
            .field("handle", &self.handle)
            .field("last", &self.last)
            .field("len", &self.len())
            .field("first", &first)
            .finish()
    }
}

impl fmt::Debug for PageEntry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageEntry")
            .field("page", &self.page.0)
            .field("encoding", &self.encoding)
            .field("checksum", &format_args!("{:016x}", self.checksum))
            .field("bytes", &self.data.len())
            .finish()
    }
}

impl PageEntry<'_> {
    /// Writes the page's bytes to `out` and checks that they are the bytes of this page of `layer`.
    ///
    /// # Errors
    /// [`WireError::Checksum`] or [`WireError::Packing`] when they are not (`out` then holds rubbish, which must not be
    /// mapped), [`WireError::Absent`] when the source does not hold the page.
    pub fn decompress_into(&self, layer: LayerId, out: &mut [u8; PAGE_SIZE]) -> Result<(), WireError> {
        let page = self.page;
        match self.encoding {
            Encoding::Raw => out.copy_from_slice(self.data.get(..PAGE_SIZE).ok_or(WireError::Packing { layer, page })?),
            Encoding::Zero => out.fill(0),
            Encoding::Lz4 => match lz4_flex::block::decompress_into(self.data, out) {
                Ok(PAGE_SIZE) => {}
                _ => return Err(WireError::Packing { layer, page }),
            },
            Encoding::Absent => return Err(WireError::Absent { layer, page }),
        }
        check(layer, page, self.checksum, out)
    }
}

impl<'a> EntryRun<'a> {
    /// The pages of the run one by one.
    pub fn entries(&self) -> impl Iterator<Item = PageEntry<'a>> + use<'a> {
        self.entries.iter()
    }

    /// Checks that the bytes of a raw or zero run are those of these pages of `layer`, without copying them.
    ///
    /// # Errors
    /// [`WireError::Checksum`] for the first page that differs, [`WireError::Absent`] for an absent run, and
    /// [`WireError::Packing`] for an LZ4 run: unpack it with [`PageEntry::decompress_into`], which checks it.
    pub fn verify(&self, layer: LayerId) -> Result<(), WireError> {
        for entry in self.entries() {
            let page = entry.page;
            match entry.encoding {
                Encoding::Raw => check(layer, page, entry.checksum, entry.data)?,
                Encoding::Zero => check(layer, page, entry.checksum, &[0; PAGE_SIZE])?,
                Encoding::Lz4 => return Err(WireError::Packing { layer, page }),
                Encoding::Absent => return Err(WireError::Absent { layer, page }),
            }
        }
        Ok(())
    }
}

fn check(layer: LayerId, page: PageIndex, expected: u64, bytes: &[u8]) -> Result<(), WireError> {
    let found = page_checksum(layer, page, bytes);
    if found == expected { Ok(()) } else { Err(WireError::Checksum { layer, page, expected, found }) }
}

#[cfg(test)]
mod tests;
