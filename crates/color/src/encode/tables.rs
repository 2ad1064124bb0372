//! What a map tells besides its pages: the kernel, files, processes.

use super::{
    MAX_TABLE, MapError,
    bytes::{Reader, clip, put_delta, put_text, put_varint, text},
};
use crate::files::MAX_PATH;
use crate::kernel::Knowledge;
use crate::map::{ColorMap, FileFacts, KernelFacts, MAX_PROCESSES, Method, ProcessFacts, SuperblockFacts};

const MAX_TROUBLE: usize = 1000;
const MAX_RELEASE: usize = 127;
const MAX_BUILD: usize = 127;
const MAX_ID: usize = 31;
const MAX_COMMAND: usize = 15;
const MAX_CACHE: usize = 63;
/// Of what was learnt about the kernel, as JSON: about sixty numbers by name.
const MAX_KNOWLEDGE: usize = 8000;

const METHODS: [Method; 4] = [Method::None, Method::PageTables, Method::FrameTable, Method::Full];

/// Appends all but files and pages.
pub(super) fn put_facts(out: &mut Vec<u8>, map: &ColorMap) {
    out.push(METHODS.iter().position(|&method| method == map.method).unwrap_or(0) as u8);
    put_text(out, &map.trouble, MAX_TROUBLE);
    out.push(u8::from(map.poisons_free));
    out.push(u8::from(map.kernel.is_some()));
    if let Some(kernel) = &map.kernel {
        put_text(out, &kernel.release, MAX_RELEASE);
        put_text(out, &kernel.build, MAX_BUILD);
        out.push(kernel.levels);
        put_varint(out, kernel.image);
        put_varint(out, kernel.image_pages.into());
    }
    put_varint(out, map.superblocks.len() as u64);
    for superblock in &map.superblocks {
        put_text(out, &superblock.id, MAX_ID);
        put_text(out, &superblock.kind, MAX_ID);
        put_varint(out, superblock.device.into());
    }
    put_varint(out, map.processes.len() as u64);
    for process in &map.processes {
        put_varint(out, process.root);
        put_varint(out, process.pid.into());
        put_text(out, &process.command, MAX_COMMAND);
    }
    put_varint(out, map.caches.len() as u64);
    for cache in &map.caches {
        put_text(out, cache, MAX_CACHE);
    }
    let knowledge = map.knowledge.as_ref().and_then(|known| serde_json::to_string(known).ok());
    put_text(out, knowledge.filter(|text| text.len() <= MAX_KNOWLEDGE).as_deref().unwrap_or(""), MAX_KNOWLEDGE);
}

/// Reads what [`put_facts`] wrote.
pub(super) fn facts(mut from: Reader<'_>) -> Result<ColorMap, MapError> {
    let from = &mut from;
    let method = METHODS.get(usize::from(from.byte()?)).copied().ok_or(MapError::Malformed("method"))?;
    let trouble = from.text(MAX_TROUBLE)?;
    let poisons_free = from.flag()?;
    let kernel = if from.flag()? { Some(kernel(from)?) } else { None };
    let superblocks = table(from, MAX_TABLE, |from| {
        Ok(SuperblockFacts { id: from.text(MAX_ID)?, kind: from.text(MAX_ID)?, device: from.varint_u32()? })
    })?;
    let processes = table(from, MAX_PROCESSES, |from| {
        Ok(ProcessFacts { root: from.varint()?, pid: from.varint_u32()?, command: from.text(MAX_COMMAND)? })
    })?;
    let caches = table(from, MAX_TABLE, |from| from.text(MAX_CACHE))?;
    let knowledge = match from.text(MAX_KNOWLEDGE)? {
        text if text.is_empty() => None,
        text => Some(knowledge(&text)?),
    };
    from.finish()?;
    Ok(ColorMap {
        method,
        trouble,
        kernel,
        poisons_free,
        superblocks,
        processes,
        caches,
        knowledge,
        ..ColorMap::default()
    })
}

fn knowledge(text: &str) -> Result<Knowledge, MapError> {
    let bad = MapError::Malformed("what was learnt about the kernel");
    serde_json::from_str(text).ok().filter(Knowledge::is_sane).ok_or(bad)
}

fn kernel(from: &mut Reader<'_>) -> Result<KernelFacts, MapError> {
    Ok(KernelFacts {
        release: from.text(MAX_RELEASE)?,
        build: from.text(MAX_BUILD)?,
        levels: from.byte()?,
        image: from.varint()?,
        image_pages: from.varint_u32()?,
    })
}

fn table<T>(
    from: &mut Reader<'_>,
    most: usize,
    mut entry: impl FnMut(&mut Reader<'_>) -> Result<T, MapError>,
) -> Result<Vec<T>, MapError> {
    let count = from.varint()?;
    if count > most as u64 {
        return Err(MapError::TooLarge);
    }
    // Grows with the bytes that are there.
    (0..count).map(|_| entry(from)).collect()
}

/// The streams of the files: addresses, inodes, superblocks, lengths of paths' shared beginnings and of their rests, rests.
pub(super) fn files(files: &[FileFacts]) -> [Vec<u8>; 6] {
    let mut streams: [Vec<u8>; 6] = Default::default();
    let [addresses, inodes, superblocks, shared, rests, texts] = &mut streams;
    let (mut address, mut inode, mut path) = (0, 0, "");
    for file in files {
        // Addresses are multiples of 8.
        let next = file.mapping.rotate_right(3);
        put_delta(addresses, address, next);
        put_delta(inodes, inode, file.inode);
        put_varint(superblocks, u64::from(file.superblock) << 1 | u64::from(file.swap_backed));
        let whole = clip(&file.path, MAX_PATH);
        let same = path.bytes().zip(whole.bytes()).take_while(|(a, b)| a == b).count();
        let rest = whole.as_bytes().get(same..).unwrap_or_default();
        shared.push(same as u8);
        rests.push(rest.len() as u8);
        texts.extend(rest);
        (address, inode, path) = (next, file.inode, whole);
    }
    streams
}

/// Reads what [`files`] wrote: at most `most` files of `superblocks` superblocks.
pub(super) fn read_files(
    [mut addresses, mut inodes, mut kinds, mut shared, mut rests, mut texts]: [Reader<'_>; 6],
    superblocks: usize,
    most: usize,
) -> Result<Vec<FileFacts>, MapError> {
    if shared.0.len() > most {
        return Err(MapError::TooLarge);
    }
    let mut files = Vec::new();
    let (mut address, mut inode, mut path) = (0, 0, Vec::new());
    while !shared.0.is_empty() {
        address = addresses.delta(address)?;
        inode = inodes.delta(inode)?;
        let kind = kinds.varint()?;
        let superblock = u32::try_from(kind >> 1).map_err(|_| MapError::Malformed("superblock"))?;
        if superblock as usize >= superblocks.max(1) {
            return Err(MapError::Malformed("superblock"));
        }
        let same = usize::from(shared.byte()?);
        if same > path.len() {
            return Err(MapError::Malformed("path"));
        }
        path.truncate(same);
        let rest = usize::from(rests.byte()?);
        path.extend(texts.bytes(rest)?);
        if path.len() > MAX_PATH {
            return Err(MapError::Malformed("a text is too long"));
        }
        files.push(FileFacts {
            mapping: address.rotate_left(3),
            inode,
            superblock,
            swap_backed: kind & 1 != 0,
            path: text(path.clone())?,
        });
    }
    [addresses, inodes, kinds, rests, texts].into_iter().try_for_each(Reader::finish)?;
    Ok(files)
}
