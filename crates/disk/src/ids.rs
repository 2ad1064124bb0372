//! The identifier of a frozen disk.

use ramet_memory::{IdError, LayerId};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A frozen disk: what the chain of one checkpoint shows. 128 bits, drawn at random.
///
/// A frozen disk travels between hosts as a layer of 4 KiB pages with the same number ([`Self::layer`]): page n of the
/// layer is the bytes from n * 4096 of the disk. What follows the end of the disk in its last page is zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(LayerId);

/// The bit by which twins differ. It is among their first digits, which are what shortened names have of them.
const TWIN: u128 = 1 << 127;

impl DiskId {
    /// A new identifier, drawn from the kernel's random numbers.
    ///
    /// # Panics
    /// When the kernel has no random numbers to give (never on a booted Linux).
    #[must_use]
    pub fn random() -> Self {
        Self(LayerId::random())
    }

    /// A new pair of identifiers. Each tells the other: [`Self::twin`].
    ///
    /// # Panics
    /// As [`Self::random`].
    #[must_use]
    pub fn random_twins() -> [Self; 2] {
        let first = Self::from_u128(Self::random().as_u128() & !TWIN);
        [first, first.twin()]
    }

    /// The other one of a pair; whether there is a pair, the caller knows.
    #[must_use]
    pub const fn twin(self) -> Self {
        Self::from_u128(self.as_u128() ^ TWIN)
    }

    /// Whether it would be the second one of a pair.
    #[must_use]
    pub const fn is_second_twin(self) -> bool {
        self.as_u128() & TWIN != 0
    }

    /// The identifier with this number.
    #[must_use]
    pub const fn from_u128(value: u128) -> Self {
        Self(LayerId::from_u128(value))
    }

    /// Its number.
    #[must_use]
    pub const fn as_u128(self) -> u128 {
        self.0.as_u128()
    }

    /// Its first digits, for people and for names of files.
    #[must_use]
    pub fn short(self) -> String {
        self.0.short()
    }

    /// The layer as which the disk travels.
    #[must_use]
    pub const fn layer(self) -> LayerId {
        self.0
    }

    /// The disk that travels as this layer.
    #[must_use]
    pub const fn from_layer(layer: LayerId) -> Self {
        Self(layer)
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskId({})", self.0)
    }
}

impl FromStr for DiskId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        text.parse().map(Self)
    }
}
