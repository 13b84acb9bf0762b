//! The nearest known word, for errors about unknown keys.

/// The candidate that `word` most likely meant, or `None` where none is close.
///
/// Distance is that of Damerau and Levenshtein (insertions, deletions, substitutions, swaps of neighbours) without
/// regard to case; up to a third of the longer word, and at least one character, may differ. The first of equals wins.
///
/// ```
/// assert_eq!(updraft_base::nearest("learning_rat", ["epochs", "learning_rate"]), Some("learning_rate"));
/// assert_eq!(updraft_base::nearest("zebra", ["epochs", "learning_rate"]), None);
/// ```
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let distance = strsim::damerau_levenshtein(&word, &candidate.to_lowercase());
        let longer = word.chars().count().max(candidate.chars().count());
        if distance <= (longer / 3).max(1) && best.is_none_or(|(d, _)| distance < d) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn a_slip_of_the_finger_finds_the_word_it_meant() {
        let known = ["batch", "label", "normalize", "seed"];
        for (word, meant) in [
            ("lable", Some("label")),
            ("Batch", Some("batch")),
            ("normalise", Some("normalize")),
            ("sed", Some("seed")),
            ("temperature", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
    }
}
