//! One frozen overlay in the place of several.
//!
//! `qemu-img convert` cannot do this: what no layer holds must stay a hole through which the lower disk is seen, what a layer
//! holds as zero must stay zero, and it decides that by the cluster, while our overlays tell it for each subcluster. So the
//! tables of the layers are read here, and the new overlay is written here. The layers are frozen, so nobody is asked.
//!
//! # The file that is written
//!
//! ```text
//! header | data clusters and L2 tables, in the order of the disk | L1 table | refcount blocks | refcount table
//! ```
//!
//! qcow2 version 3, clusters of 64 KiB with 32 subclusters, no backing file. The header comes last: a file that is not
//! whole is no qcow2.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

/// Bytes of a cluster: those of the overlays that [`crate::overlay`] makes.
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Bytes of a subcluster.
const UNIT: u64 = CLUSTER / UNITS;
/// Subclusters of a cluster.
const UNITS: u64 = 32;
/// Clusters that an L2 table with subclusters tells of.
const L2_ENTRIES: u64 = CLUSTER / 16;
const MAGIC: u32 = 0x5146_49fb;
/// The feature "extended L2 entries".
const SUBCLUSTERS: u64 = 1 << 4;
/// The entry's cluster is not shared by snapshots.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Why layers were not merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A layer can't be read.
    #[error("Cannot read the layer {path}")]
    Read {
        /// The layer.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer is not what Ramet's overlays are.
    #[error("The layer {path} can't be merged: {what}")]
    Layer {
        /// The layer.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The merged overlay can't be written.
    #[error("Cannot write the merged layer")]
    Write(#[source] io::Error),
    /// The caller wants it no more.
    #[error("the merging of layers was stopped")]
    Stopped,
}

/// Writes into `target`, an empty file, an overlay that shows the same as `layers`, lowest first, over whatever lies below
/// them. `go_on` is asked every now and then.
///
/// # Errors
/// [`MergeError`]; `target` is then no overlay.
pub fn merge(layers: &[PathBuf], size: u64, target: &File, go_on: &dyn Fn() -> bool) -> Result<(), MergeError> {
    // Uppermost first: the first one that has something has it.
    let mut layers = layers.iter().rev().map(|path| Layer::open(path, size)).collect::<Result<Vec<_>, _>>()?;
    let mut target = Target { file: target, next: 1 };
    let mut l1 = Vec::new();
    let clusters = size.div_ceil(CLUSTER);
    let mut buffer = vec![0; CLUSTER as usize];
    for first in (0..clusters).step_by(L2_ENTRIES as usize) {
        let mut l2 = Vec::new();
        for cluster in first..clusters.min(first + L2_ENTRIES) {
            if cluster.is_multiple_of(256) && !go_on() {
                return Err(MergeError::Stopped);
            }
            if let Some((entry, bits)) = merge_cluster(&mut layers, cluster, &mut target, &mut buffer)? {
                l2.resize(CLUSTER as usize, 0);
                let at = ((cluster - first) * 16) as usize;
                l2[at..at + 8].copy_from_slice(&entry.to_be_bytes());
                l2[at + 8..at + 16].copy_from_slice(&bits.to_be_bytes());
            }
        }
        l1.push(if l2.is_empty() { 0 } else { target.append(&l2)? | COPIED });
    }
    target.finish(size, &l1)
}

/// What a cluster is in the merged overlay: its entry and its bits. None: all of it is seen from below.
fn merge_cluster(
    layers: &mut [Layer],
    cluster: u64,
    target: &mut Target<'_>,
    buffer: &mut [u8],
) -> Result<Option<(u64, u64)>, MergeError> {
    // Subclusters that are told by now, and those of them that are zero.
    let (mut told, mut zero) = (0u32, 0u32);
    let mut begun = false;
    for layer in layers {
        let here = layer.cluster(cluster)?;
        let (data, zeros) = (here.data & !told, here.zero & !told);
        told |= data | zeros;
        zero |= zeros;
        if data != 0 && !begun {
            buffer.fill(0);
            begun = true;
        }
        for (start, end) in runs(data) {
            let part = &mut buffer[(start * UNIT) as usize..(end * UNIT) as usize];
            layer.read(here.offset + start * UNIT, part)?;
        }
        if told == u32::MAX {
            break;
        }
    }
    if told == 0 {
        return Ok(None);
    }
    // Zeros that were written as data need no room.
    for unit in 0..UNITS {
        if buffer[(unit * UNIT) as usize..][..UNIT as usize].iter().all(|byte| *byte == 0) {
            zero |= told & (1 << unit);
        }
    }
    let data = told & !zero;
    let bits = u64::from(zero) << 32 | u64::from(data);
    if data == 0 {
        return Ok(Some((0, bits)));
    }
    let offset = target.cluster();
    for (start, end) in runs(data) {
        let part = &buffer[(start * UNIT) as usize..(end * UNIT) as usize];
        target.file.write_all_at(part, offset + start * UNIT).map_err(MergeError::Write)?;
    }
    Ok(Some((offset | COPIED, bits)))
}

/// Runs of bits that are set: where each begins, and where it has ended.
fn runs(bits: u32) -> impl Iterator<Item = (u64, u64)> {
    let mut left = u64::from(bits);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let start = left.trailing_zeros();
        let end = start + (left >> start).trailing_ones();
        left &= u64::MAX << end;
        Some((u64::from(start), u64::from(end)))
    })
}

/// A cluster in one layer.
#[derive(Debug, Clone, Copy, Default)]
struct Cluster {
    /// Where it lies in the file.
    offset: u64,
    /// Subclusters that lie there.
    data: u32,
    /// Subclusters that are zero. What is neither is seen from below.
    zero: u32,
}

/// A layer that is read.
#[derive(Debug)]
struct Layer {
    path: PathBuf,
    file: File,
    subclusters: bool,
    l1: Vec<u64>,
    /// The L2 table that was used last, by its place in the L1 table. Empty: there is none.
    l2: Option<(u64, Vec<u8>)>,
}

impl Layer {
    fn open(path: &Path, size: u64) -> Result<Self, MergeError> {
        let read = |source| MergeError::Read { path: path.to_owned(), source };
        let bad = |what| MergeError::Layer { path: path.to_owned(), what };
        let file = File::open(path).map_err(read)?;
        let mut header = [0; 104];
        file.read_exact_at(&mut header, 0).map_err(read)?;
        if u32_at(&header, 0) != MAGIC || u32_at(&header, 4) != 3 {
            return Err(bad("it is no qcow2 of version 3"));
        }
        let features = u64_at(&header, 72);
        if features & !SUBCLUSTERS != 0 || u32_at(&header, 32) != 0 || u32_at(&header, 60) != 0 {
            return Err(bad("it has features that no overlay of Ramet has"));
        }
        if u32_at(&header, 20) != CLUSTER_BITS {
            return Err(bad("its clusters do not have 64 KiB"));
        }
        if u64_at(&header, 24) != size {
            return Err(bad("its size is another than the disk's"));
        }
        let subclusters = features & SUBCLUSTERS != 0;
        let mut layer = Self { path: path.to_owned(), file, subclusters, l1: Vec::new(), l2: None };
        let tables = size.div_ceil(CLUSTER).div_ceil(layer.entries());
        if u64::from(u32_at(&header, 36)) < tables {
            return Err(bad("its L1 table is too short"));
        }
        let mut bytes = vec![0; tables as usize * 8];
        layer.file.read_exact_at(&mut bytes, u64_at(&header, 40)).map_err(read)?;
        layer.l1 = bytes.chunks_exact(8).map(|b| u64_at(b, 0) & OFFSET).collect();
        Ok(layer)
    }

    /// Clusters that one of its L2 tables tells of.
    const fn entries(&self) -> u64 {
        if self.subclusters { L2_ENTRIES } else { CLUSTER / 8 }
    }

    fn bad(&self, what: &'static str) -> MergeError {
        MergeError::Layer { path: self.path.clone(), what }
    }

    fn cluster(&mut self, cluster: u64) -> Result<Cluster, MergeError> {
        let entries = self.entries();
        let (table, entry) = (cluster / entries, (cluster % entries) as usize);
        if self.l2.as_ref().is_none_or(|l2| l2.0 != table) {
            let mut bytes = Vec::new();
            let offset = self.l1[table as usize];
            if offset != 0 {
                bytes.resize(CLUSTER as usize, 0);
                self.read(offset, &mut bytes)?;
            }
            self.l2 = Some((table, bytes));
        }
        let bytes = match &self.l2 {
            Some((_, bytes)) if !bytes.is_empty() => bytes,
            _ => return Ok(Cluster::default()),
        };
        let (word, bits) = match self.subclusters {
            true => (u64_at(bytes, entry * 16), u64_at(bytes, entry * 16 + 8)),
            false => match u64_at(bytes, entry * 8) {
                word if word & 1 != 0 => (word, 0xffff_ffff << 32),
                word if word & OFFSET != 0 => (word, 0xffff_ffff),
                word => (word, 0),
            },
        };
        let here = Cluster { offset: word & OFFSET, data: bits as u32, zero: (bits >> 32) as u32 };
        if word & COMPRESSED != 0 {
            return Err(self.bad("it has compressed clusters"));
        }
        if here.data & here.zero != 0 || (here.data != 0 && here.offset == 0) || !here.offset.is_multiple_of(CLUSTER) {
            return Err(self.bad("its tables are damaged"));
        }
        Ok(here)
    }

    /// Reads from the file; what is past its end is zero.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MergeError> {
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => {
                    into[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(MergeError::Read { path: self.path.clone(), source }),
            }
        }
        Ok(())
    }
}

/// The overlay that is written.
#[derive(Debug)]
struct Target<'a> {
    file: &'a File,
    /// The first cluster that is free.
    next: u64,
}

impl Target<'_> {
    /// Takes the next cluster: where it is.
    fn cluster(&mut self) -> u64 {
        self.next += 1;
        (self.next - 1) * CLUSTER
    }

    /// Writes whole clusters, the last one filled up: where they are.
    fn append(&mut self, bytes: &[u8]) -> Result<u64, MergeError> {
        let at = self.next * CLUSTER;
        self.file.write_all_at(bytes, at).map_err(MergeError::Write)?;
        self.next += (bytes.len() as u64).div_ceil(CLUSTER);
        Ok(at)
    }

    fn finish(mut self, size: u64, l1: &[u64]) -> Result<(), MergeError> {
        let l1_at = self.append(&bytes_of(l1))?;
        // Refcounts of 16 bits; those of their own clusters, too.
        let per_block = CLUSTER / 2;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let all = self.next + blocks + table;
            let needed = (all.div_ceil(per_block), blocks.div_ceil(CLUSTER / 8));
            if needed == (blocks, table) {
                break;
            }
            (blocks, table) = needed;
        }
        let all = self.next + blocks + table;
        let mut entries = Vec::new();
        for block in 0..blocks {
            let used = (all - block * per_block).min(per_block);
            entries.push(self.append(&[0, 1].repeat(used as usize))?);
        }
        let table_at = self.append(&bytes_of(&entries))?;
        self.file.set_len(all * CLUSTER).map_err(MergeError::Write)?;

        let mut header = [0; 120];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &size.to_be_bytes());
        put(36, &(l1.len() as u32).to_be_bytes());
        put(40, &l1_at.to_be_bytes());
        put(48, &table_at.to_be_bytes());
        put(56, &(table as u32).to_be_bytes());
        put(72, &SUBCLUSTERS.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        self.file.write_all_at(&header, 0).map_err(MergeError::Write)
    }
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        let all = |bits| runs(bits).collect::<Vec<_>>();
        assert_eq!(all(0), []);
        assert_eq!(all(u32::MAX), [(0, 32)]);
        assert_eq!(all(0b1011), [(0, 2), (3, 4)]);
        assert_eq!(all(1 << 31 | 1), [(0, 1), (31, 32)]);
    }
}
