//! Bytes to frames and back. Decoding allocates nothing and looks at no byte twice that it need not.

use super::{
    Encoding, EntryRun, ErrorCode, Frame, HEADER_LEN, LayerStatus, MAGIC, MAX_ENTRIES, MAX_PAGES_PER_REQUEST,
    MAX_PAYLOAD, MAX_TEXT, Message, PageEntry, Pages, Priority, TABLE_ENTRY, VERSION, WireError,
};
use ramet_memory::{FamilyId, LayerId, PAGE_SIZE, PageIndex, PageRun};

/// Page numbers from here on are refused: no offset in a page file can then overflow.
const PAGE_LIMIT: u64 = 1 << 40;

const HELLO: u8 = 1;
const HELLO_ACK: u8 = 2;
const OPEN_LAYER: u8 = 3;
const LAYER_OPENED: u8 = 4;
const GET_PAGES: u8 = 5;
pub(super) const PAGES: u8 = 6;
const ERROR: u8 = 7;
const PING: u8 = 8;
const PONG: u8 = 9;

impl<'a> Frame<'a> {
    /// The length of the frame that begins with `bytes`, header included; `None` while fewer than [`HEADER_LEN`] bytes
    /// are there.
    ///
    /// # Errors
    /// [`WireError`] when no frame of this version begins so. The connection cannot be used any further.
    pub fn length(bytes: &[u8]) -> Result<Option<usize>, WireError> {
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let mut rest = &header[..];
        let fields = &mut rest;
        let magic = u32::from_le_bytes(take(fields, "header")?);
        if magic != MAGIC {
            return Err(WireError::Magic { found: magic });
        }
        let [version, kind, flags_low, flags_high] = take(fields, "header")?;
        if version != VERSION {
            return Err(WireError::Version { found: version });
        }
        if !(HELLO..=PONG).contains(&kind) {
            return Err(WireError::Kind { kind });
        }
        if (flags_low, flags_high) != (0, 0) {
            return Err(WireError::Malformed { message: name(kind), what: "it has flags that do not exist" });
        }
        let len = u32::from_le_bytes(take(fields, "header")?);
        if len as usize > MAX_PAYLOAD {
            return Err(WireError::TooLong { len });
        }
        Ok(Some(HEADER_LEN + len as usize))
    }

    /// Decodes the frame at the beginning of `bytes` and tells its length. `None` while it is not complete.
    ///
    /// # Errors
    /// [`WireError`] when the bytes are no frame of this version. The connection cannot be used any further.
    pub fn decode(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, WireError> {
        let Some(len) = Self::length(bytes)? else { return Ok(None) };
        let Some((kind, req)) = bytes.first_chunk::<HEADER_LEN>().map(|h| (h[5], [h[12], h[13], h[14], h[15]])) else {
            return Ok(None);
        };
        let Some(payload) = bytes.get(HEADER_LEN..len) else { return Ok(None) };
        let message = decode_payload(kind, payload)?;
        Ok(Some((Frame { req: u32::from_le_bytes(req), message }, len)))
    }

    /// Appends the frame's bytes to `out`. Texts longer than [`MAX_TEXT`] are cut at a character.
    ///
    /// [`Message::Pages`] are built with [`super::PagesWriter`]; here they are only copied.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let at = begin(out, kind(&self.message), self.req);
        match self.message {
            Message::Hello { family, version, host } => {
                out.extend(family.as_u128().to_le_bytes());
                out.push(version);
                put_text(out, host);
            }
            Message::HelloAck { version, host } => {
                out.push(version);
                put_text(out, host);
            }
            Message::OpenLayer { handle, layer } => {
                out.extend(handle.to_le_bytes());
                out.extend(layer.as_u128().to_le_bytes());
            }
            Message::LayerOpened { handle, status } => {
                out.extend(handle.to_le_bytes());
                out.push(status as u8);
            }
            Message::GetPages { handle, start, count, priority } => {
                out.extend(handle.to_le_bytes());
                out.extend(start.0.to_le_bytes());
                out.extend(count.to_le_bytes());
                out.push(priority as u8);
            }
            Message::Pages(pages) => {
                out.extend(pages.handle.to_le_bytes());
                out.extend((pages.len() as u16).to_le_bytes());
                out.extend([u8::from(pages.last), 0]);
                out.extend_from_slice(pages.data);
                out.extend_from_slice(pages.table);
            }
            Message::Error { code, message } => {
                out.extend((code as u16).to_le_bytes());
                put_text(out, message);
            }
            Message::Ping { token } | Message::Pong { token } => out.extend(token.to_le_bytes()),
        }
        end(out, at);
    }
}

/// Writes a header whose length is still open; returns where it begins.
pub(super) fn begin(out: &mut Vec<u8>, kind: u8, req: u32) -> usize {
    let at = out.len();
    out.extend(MAGIC.to_le_bytes());
    out.extend([VERSION, kind, 0, 0]);
    out.extend([0; 4]);
    out.extend(req.to_le_bytes());
    at
}

/// Fills in the length of the frame whose header begins at `at` and which ends where `out` ends.
pub(super) fn end(out: &mut [u8], at: usize) {
    let len = (out.len() - at - HEADER_LEN) as u32;
    out[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
}

fn kind(message: &Message<'_>) -> u8 {
    match message {
        Message::Hello { .. } => HELLO,
        Message::HelloAck { .. } => HELLO_ACK,
        Message::OpenLayer { .. } => OPEN_LAYER,
        Message::LayerOpened { .. } => LAYER_OPENED,
        Message::GetPages { .. } => GET_PAGES,
        Message::Pages(_) => PAGES,
        Message::Error { .. } => ERROR,
        Message::Ping { .. } => PING,
        Message::Pong { .. } => PONG,
    }
}

fn name(kind: u8) -> &'static str {
    match kind {
        HELLO => "Hello",
        HELLO_ACK => "HelloAck",
        OPEN_LAYER => "OpenLayer",
        LAYER_OPENED => "LayerOpened",
        GET_PAGES => "GetPages",
        PAGES => "Pages",
        ERROR => "Error",
        PING => "Ping",
        _ => "Pong",
    }
}

fn decode_payload(kind: u8, payload: &[u8]) -> Result<Message<'_>, WireError> {
    let message = name(kind);
    let malformed = |what| WireError::Malformed { message, what };
    let mut rest = payload;
    let body = &mut rest;
    let decoded = match kind {
        HELLO => {
            let family = FamilyId::from_u128(u128::from_le_bytes(take(body, message)?));
            let [version] = take(body, message)?;
            Message::Hello { family, version, host: take_text(body, message)? }
        }
        HELLO_ACK => {
            let [version] = take(body, message)?;
            Message::HelloAck { version, host: take_text(body, message)? }
        }
        OPEN_LAYER => Message::OpenLayer {
            handle: u32::from_le_bytes(take(body, message)?),
            layer: LayerId::from_u128(u128::from_le_bytes(take(body, message)?)),
        },
        LAYER_OPENED => {
            let handle = u32::from_le_bytes(take(body, message)?);
            let status = match take(body, message)? {
                [0] => LayerStatus::Ok,
                [1] => LayerStatus::Unknown,
                [2] => LayerStatus::OtherFamily,
                [3] => LayerStatus::TooMany,
                _ => return Err(malformed("its status does not exist")),
            };
            Message::LayerOpened { handle, status }
        }
        GET_PAGES => {
            let handle = u32::from_le_bytes(take(body, message)?);
            let start = u64::from_le_bytes(take(body, message)?);
            let count = u16::from_le_bytes(take(body, message)?);
            let priority = match take(body, message)? {
                [0] => Priority::Demand,
                [1] => Priority::Prefetch,
                _ => return Err(malformed("its priority does not exist")),
            };
            if count == 0 || count > MAX_PAGES_PER_REQUEST {
                return Err(malformed("it asks for no pages or for more than 512"));
            }
            if start >= PAGE_LIMIT - u64::from(MAX_PAGES_PER_REQUEST) {
                return Err(malformed("its page number is out of range"));
            }
            Message::GetPages { handle, start: PageIndex(start), count, priority }
        }
        PAGES => return decode_pages(payload).map(Message::Pages),
        ERROR => {
            let code = match u16::from_le_bytes(take(body, message)?) {
                1 => ErrorCode::Version,
                2 => ErrorCode::Family,
                3 => ErrorCode::Layer,
                4 => ErrorCode::Malformed,
                5 => ErrorCode::Busy,
                6 => ErrorCode::Internal,
                7 => ErrorCode::ShuttingDown,
                8 => ErrorCode::Damaged,
                _ => return Err(malformed("its code does not exist")),
            };
            Message::Error { code, message: take_text(body, message)? }
        }
        PING => Message::Ping { token: u64::from_le_bytes(take(body, message)?) },
        PONG => Message::Pong { token: u64::from_le_bytes(take(body, message)?) },
        _ => return Err(WireError::Kind { kind }),
    };
    if body.is_empty() { Ok(decoded) } else { Err(malformed("it is longer than its contents")) }
}

fn decode_pages(payload: &[u8]) -> Result<Pages<'_>, WireError> {
    let malformed = |what| WireError::Malformed { message: "Pages", what };
    let mut rest = payload;
    let handle = u32::from_le_bytes(take(&mut rest, "Pages")?);
    let count = usize::from(u16::from_le_bytes(take(&mut rest, "Pages")?));
    let last = match take(&mut rest, "Pages")? {
        [0, 0] => false,
        [1, 0] => true,
        _ => return Err(malformed("its last field is neither 0 nor 1")),
    };
    if count > MAX_ENTRIES {
        return Err(malformed("it has more entries than allowed"));
    }
    let (data, table) = rest
        .len()
        .checked_sub(count * TABLE_ENTRY)
        .and_then(|at| rest.split_at_checked(at))
        .ok_or_else(|| malformed("it is too short for its table"))?;
    let mut used = 0;
    for entry in table.chunks_exact(TABLE_ENTRY) {
        let (page, checksum, len, encoding) = raw_entry(entry);
        if page >= PAGE_LIMIT {
            return Err(malformed("a page number is out of range"));
        }
        let good = match encoding {
            Some(Encoding::Raw) => len == PAGE_SIZE,
            Some(Encoding::Zero) => len == 0,
            Some(Encoding::Lz4) => len > 0 && len < PAGE_SIZE,
            Some(Encoding::Absent) => len == 0 && checksum == 0,
            None => false,
        };
        if !good {
            return Err(malformed("an entry's encoding and length do not fit"));
        }
        used += len;
    }
    if used != data.len() {
        return Err(malformed("its entries and its data differ in length"));
    }
    Ok(Pages { handle, last, data, table })
}

/// Page, checksum, length and encoding of a table entry. `entry` is [`TABLE_ENTRY`] bytes long; a shorter one is no
/// encoding.
fn raw_entry(entry: &[u8]) -> (u64, u64, usize, Option<Encoding>) {
    let mut rest = entry;
    let mut fields = || {
        let page = u64::from_le_bytes(take(&mut rest, "Pages").ok()?);
        let checksum = u64::from_le_bytes(take(&mut rest, "Pages").ok()?);
        let len = usize::from(u16::from_le_bytes(take(&mut rest, "Pages").ok()?));
        let encoding = match take(&mut rest, "Pages").ok()? {
            [0, 0] => Some(Encoding::Raw),
            [1, 0] => Some(Encoding::Zero),
            [2, 0] => Some(Encoding::Lz4),
            [3, 0] => Some(Encoding::Absent),
            _ => None,
        };
        Some((page, checksum, len, encoding))
    };
    fields().unwrap_or((0, 0, 0, None))
}

/// Iterates the entries of a checked [`Pages`].
pub(super) struct Entries<'a> {
    pub(super) data: &'a [u8],
    pub(super) table: &'a [u8],
}

impl<'a> Iterator for Entries<'a> {
    type Item = PageEntry<'a>;

    fn next(&mut self) -> Option<PageEntry<'a>> {
        let (entry, table) = self.table.split_at_checked(TABLE_ENTRY)?;
        let (page, checksum, len, encoding) = raw_entry(entry);
        let (bytes, data) = self.data.split_at_checked(len)?;
        (self.data, self.table) = (data, table);
        Some(PageEntry { page: PageIndex(page), encoding: encoding?, checksum, data: bytes })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let n = self.table.len() / TABLE_ENTRY;
        (n, Some(n))
    }
}

/// Iterates the runs of a checked [`Pages`].
pub(super) struct Runs<'a> {
    pub(super) rest: Pages<'a>,
}

impl<'a> Iterator for Runs<'a> {
    type Item = EntryRun<'a>;

    fn next(&mut self) -> Option<EntryRun<'a>> {
        let mut entries = self.rest.iter();
        let first = entries.next()?;
        let (mut len, mut bytes) = (1u64, first.data.len());
        if first.encoding != Encoding::Lz4 {
            for next in entries {
                if next.encoding != first.encoding || next.page.0 != first.page.0 + len {
                    break;
                }
                len += 1;
                bytes += next.data.len();
            }
        }
        let (data, data_rest) = self.rest.data.split_at_checked(bytes)?;
        let (table, table_rest) = self.rest.table.split_at_checked(len as usize * TABLE_ENTRY)?;
        let entries = Pages { data, table, ..self.rest };
        self.rest = Pages { data: data_rest, table: table_rest, ..self.rest };
        Some(EntryRun { pages: PageRun { start: first.page, len }, encoding: first.encoding, data, entries })
    }
}

fn take<const N: usize>(rest: &mut &[u8], message: &'static str) -> Result<[u8; N], WireError> {
    let short = WireError::Malformed { message, what: "it is too short" };
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(short)?;
    *rest = tail;
    Ok(*head)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text[..end];
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

fn take_text<'a>(rest: &mut &'a [u8], message: &'static str) -> Result<&'a str, WireError> {
    let [len] = take(rest, message)?;
    let text =
        rest.split_off(..usize::from(len)).ok_or(WireError::Malformed { message, what: "a text is cut short" })?;
    str::from_utf8(text).map_err(|_| WireError::Malformed { message, what: "a text is not UTF-8" })
}
