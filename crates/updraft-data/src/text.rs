//! Characters and their numbers.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The characters that a text holds, in the order of their code points; a character's place is its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary(Vec<char>);

/// A character that a vocabulary does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{character:?} is not among the {known} characters that the text was made of")]
pub struct UnknownCharacter {
    /// The character.
    pub character: char,
    /// The size of the vocabulary.
    pub known: usize,
}

impl Vocabulary {
    /// The characters of `text`.
    pub fn of(text: &str) -> Vocabulary {
        let characters: std::collections::BTreeSet<char> = text.chars().collect();
        Vocabulary(characters.into_iter().collect())
    }

    /// The number of characters.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no characters.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The numbers of the characters of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, UnknownCharacter> {
        text.chars()
            .map(|character| match self.0.binary_search(&character) {
                Ok(number) => Ok(number as i64),
                Err(_) => Err(UnknownCharacter { character, known: self.len() }),
            })
            .collect()
    }

    /// The character with this number, or `None` past the end.
    pub fn decode(&self, number: i64) -> Option<char> {
        self.0.get(usize::try_from(number).ok()?).copied()
    }
}

impl Serialize for Vocabulary {
    /// One string of all characters.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0.iter().collect::<String>())
    }
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Vocabulary, D::Error> {
        let characters: Vec<char> = String::deserialize(deserializer)?.chars().collect();
        if !characters.is_sorted_by(|a, b| a < b) {
            return Err(serde::de::Error::custom("the characters of a vocabulary are in order, each once"));
        }
        Ok(Vocabulary(characters))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_numbers_and_strangers_are_named() {
        let vocabulary = Vocabulary::of("hällo wörld");
        let numbers = vocabulary.encode("wörld").unwrap();
        let text: String = numbers.iter().filter_map(|n| vocabulary.decode(*n)).collect();
        assert_eq!(text, "wörld");
        assert_eq!(vocabulary.encode("z"), Err(UnknownCharacter { character: 'z', known: vocabulary.len() }));
        assert_eq!((vocabulary.decode(-1), vocabulary.decode(99)), (None, None));
        let json = serde_json::to_string(&vocabulary).unwrap();
        assert_eq!(serde_json::from_str::<Vocabulary>(&json).unwrap(), vocabulary);
        assert!(serde_json::from_str::<Vocabulary>("\"ba\"").is_err());
    }
}
