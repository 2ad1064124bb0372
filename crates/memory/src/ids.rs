//! 128-bit identifiers, written as 32 lowercase hexadecimal digits.

use std::{fmt, str::FromStr};

/// Text that is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a {kind}: expected 32 hexadecimal digits, as printed by `ramet`")]
pub struct IdError {
    kind: &'static str,
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(u128);

        impl $name {
            /// A new identifier, drawn from the kernel's random numbers.
            ///
            /// # Panics
            /// When the kernel has no random numbers to give (never on a booted Linux).
            #[must_use]
            pub fn random() -> Self {
                let mut bytes = [0u8; 16];
                getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
                Self(u128::from_le_bytes(bytes))
            }

            /// The identifier with this value.
            #[must_use]
            pub const fn from_u128(value: u128) -> Self {
                Self(value)
            }

            /// The identifier's value.
            #[must_use]
            pub const fn as_u128(self) -> u128 {
                self.0
            }

            /// The first 8 digits: enough for people to tell identifiers apart.
            #[must_use]
            pub fn short(self) -> String {
                self.to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let good = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                good.then(|| u128::from_str_radix(text, 16).ok())
                    .flatten()
                    .map(Self)
                    .ok_or_else(|| IdError { kind: $kind, text: text.chars().take(64).collect() })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// One virtual machine on one host.
    VmId,
    "VM id"
);
id!(
    /// A checkpoint's memory; also the checkpoint's own identifier.
    ImageId,
    "checkpoint id"
);
id!(
    /// One layer of an image: the pages that changed over the layers below.
    LayerId,
    "layer id"
);
id!(
    /// A parent and all its descendants: the unit of isolation.
    FamilyId,
    "family id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_bad_text_is_named() {
        let id = VmId::random();
        assert_eq!(id.to_string().parse::<VmId>(), Ok(id));
        assert_eq!(id.to_string().len(), 32);
        for bad in ["", "12", "+0000000000000000000000000000001", "zz000000000000000000000000000000"] {
            let err = bad.parse::<ImageId>().unwrap_err().to_string();
            assert!(err.contains("checkpoint id"), "{err}");
        }
    }

    #[test]
    fn json_is_the_hex_string() {
        let id = LayerId::from_u128(0xabc);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, "\"00000000000000000000000000000abc\"");
        assert_eq!(serde_json::from_str::<LayerId>(&json).unwrap(), id);
    }
}
