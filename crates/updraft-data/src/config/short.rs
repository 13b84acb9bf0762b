//! Settings that are one value as long as the rest is usual: `resize = [224, 224]`, or a table with more.
//!
//! A type derives both directions with `#[serde(remote = "Self")]`, which makes them functions of the type, and says
//! with [`Short`] what its short form is. What is usual is written short, so that adding a setting leaves the digests
//! of older recipes alone.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};

/// A table with a short form.
pub(super) trait Short: Sized {
    /// What stands in place of the table.
    type Value: for<'de> Deserialize<'de>;
    /// What both forms are called in errors.
    const EXPECTED: &'static str;

    /// The table with its usual settings.
    fn long(value: Self::Value) -> Self;

    /// The full form.
    fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

/// Either form.
pub(super) fn deserialize<'de, T: Short, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(Either(PhantomData))
}

struct Either<T>(PhantomData<T>);

impl<'de, T: Short> Visitor<'de> for Either<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(T::EXPECTED)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        T::Value::deserialize(text.into_deserializer()).map(T::long)
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<T, E> {
        T::Value::deserialize(number.into_deserializer()).map(T::long)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, sequence: A) -> Result<T, A::Error> {
        T::Value::deserialize(SeqAccessDeserializer::new(sequence)).map(T::long)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::table(MapAccessDeserializer::new(map))
    }
}

/// Implements both directions of a type that is [`Short`] and derives them as its own functions.
macro_rules! both_forms {
    ($name:ident) => {
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                $crate::config::short::deserialize(deserializer)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self.short() {
                    Some(value) => serde::Serialize::serialize(&value, serializer),
                    None => $name::serialize(self, serializer),
                }
            }
        }
    };
}
pub(super) use both_forms;
