//! Which samples are used: conditions on columns, all of which must hold.

use crate::config::{Choice, Condition};
use crate::rows::Cells;

/// Checked conditions, each with the place of its column among those that are read for it.
pub(crate) struct Filter {
    conditions: Vec<Condition>,
}

impl Filter {
    /// # Errors
    /// The column of a condition that says nothing, or one that no value meets.
    pub(crate) fn new(conditions: &[Condition]) -> Result<Filter, String> {
        for condition in conditions {
            let column = &condition.column;
            let (least, most) = (condition.at_least, condition.at_most);
            if *condition == (Condition { column: column.clone(), ..Condition::default() }) {
                return Err(format!(
                    "the condition on `{column}` says nothing: give `at_least`, `at_most`, `one_of`, `len_at_least` or `len_at_most`"
                ));
            }
            if least.zip(most).is_some_and(|(least, most)| least > most)
                || condition.len_at_least.zip(condition.len_at_most).is_some_and(|(least, most)| least > most)
            {
                return Err(format!("the condition on `{column}` is met by nothing: its least is above its most"));
            }
        }
        Ok(Filter { conditions: conditions.to_vec() })
    }

    /// The columns that the conditions are about, in their order.
    pub(crate) fn columns(&self) -> impl Iterator<Item = &str> {
        self.conditions.iter().map(|c| c.column.as_str())
    }

    /// Whether no row can meet all conditions, by the least and largest number that the column of each has, as far as they
    /// are known.
    pub(crate) fn excludes(&self, bounds: impl Fn(usize) -> Option<(f64, f64)>) -> bool {
        self.conditions.iter().enumerate().any(|(place, condition)| {
            let is_about_numbers =
                condition.at_least.is_some() || condition.at_most.is_some() || !condition.one_of.is_empty();
            let Some((min, max)) = bounds(place).filter(|_| is_about_numbers) else { return false };
            let within = |choice: &Choice| matches!(choice, Choice::Number(number) if (min..=max).contains(number));
            condition.at_least.is_some_and(|least| max < least)
                || condition.at_most.is_some_and(|most| min > most)
                || (!condition.one_of.is_empty() && !condition.one_of.iter().any(within))
        })
    }

    /// Which rows meet all conditions; `cells` holds the columns of the conditions.
    ///
    /// # Errors
    /// A condition that does not fit its column.
    pub(crate) fn passes(&self, cells: &[Cells], rows: usize) -> Result<Vec<bool>, String> {
        let mut passes = vec![true; rows];
        for (condition, cells) in self.conditions.iter().zip(cells) {
            if condition.at_least.is_some() || condition.at_most.is_some() {
                let values = numbers(&condition.column, cells)?;
                for (pass, value) in passes.iter_mut().zip(values) {
                    // No bound holds for NaN.
                    *pass &= condition.at_least.is_none_or(|least| value >= least)
                        && condition.at_most.is_none_or(|most| value <= most);
                }
            }
            if !condition.one_of.is_empty() {
                among(condition, cells, &mut passes)?;
            }
            if condition.len_at_least.is_some() || condition.len_at_most.is_some() {
                let lens: Vec<u64> = match cells {
                    Cells::Bytes(cells) => cells.iter().map(|c| c.len() as u64).collect(),
                    Cells::Lists(cells) => cells.iter().map(|c| c.len() as u64).collect(),
                    Cells::Numbers(_) => {
                        return Err(format!("`{}` holds numbers, which have no length", condition.column));
                    }
                };
                for (pass, len) in passes.iter_mut().zip(lens) {
                    *pass &= condition.len_at_least.is_none_or(|least| len >= least)
                        && condition.len_at_most.is_none_or(|most| len <= most);
                }
            }
        }
        Ok(passes)
    }
}

fn among(condition: &Condition, cells: &Cells, passes: &mut [bool]) -> Result<(), String> {
    match cells {
        Cells::Bytes(cells) => {
            for (pass, cell) in passes.iter_mut().zip(cells) {
                *pass &=
                    condition.one_of.iter().any(|c| matches!(c, Choice::Text(text) if text.as_bytes() == &cell[..]));
            }
        }
        _ => {
            for (pass, value) in passes.iter_mut().zip(numbers(&condition.column, cells)?) {
                *pass &= condition.one_of.iter().any(|c| matches!(c, Choice::Number(number) if *number == value));
            }
        }
    }
    Ok(())
}

fn numbers(column: &str, cells: &Cells) -> Result<Vec<f64>, String> {
    let refused = |what: &str| format!("a condition on numbers cannot be put to `{column}`, which holds {what}");
    match cells {
        Cells::Numbers(tensor) if tensor.len() == cells.len() => tensor.to_f64().map_err(|e| e.to_string()),
        Cells::Numbers(_) => Err(refused("several numbers a row")),
        Cells::Lists(_) => Err(refused("lists")),
        Cells::Bytes(_) => Err(refused("text or bytes")),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use updraft_graph::Tensor;

    use super::*;

    #[test]
    fn rows_pass_where_every_condition_holds() {
        let scores = Cells::Numbers(Tensor::vector(&[0.2f32, 0.5, f32::NAN, 0.9]));
        let languages = Cells::Bytes(["en", "de", "en", "fr"].map(|s| Bytes::from_static(s.as_bytes())).to_vec());
        let lists = Cells::Lists((0..4).map(|n| Tensor::vector(&vec![0i64; n])).collect());
        let on = |column: &str| Condition { column: column.into(), ..Condition::default() };
        for (conditions, cells, expected) in [
            (vec![Condition { at_least: Some(0.5), ..on("score") }], vec![&scores], [false, true, false, true]),
            (vec![Condition { at_most: Some(0.5), ..on("score") }], vec![&scores], [true, true, false, false]),
            (
                vec![Condition {
                    one_of: vec![Choice::Text("en".into()), Choice::Text("fr".into())],
                    ..on("language")
                }],
                vec![&languages],
                [true, false, true, true],
            ),
            (
                vec![
                    Condition { len_at_least: Some(1), len_at_most: Some(2), ..on("tokens") },
                    Condition { one_of: vec![Choice::Number(0.5)], ..on("score") },
                ],
                vec![&lists, &scores],
                [false, true, false, false],
            ),
        ] {
            let cells: Vec<Cells> = cells.into_iter().cloned().collect();
            assert_eq!(Filter::new(&conditions).unwrap().passes(&cells, 4).unwrap(), expected, "{conditions:?}");
        }
        let refused = |condition: Condition, cells: &Cells| {
            Filter::new(&[condition]).and_then(|f| f.passes(std::slice::from_ref(cells), 4)).unwrap_err()
        };
        assert!(refused(on("score"), &scores).contains("says nothing"));
        assert!(
            refused(Condition { at_least: Some(2.0), at_most: Some(1.0), ..on("score") }, &scores).contains("nothing")
        );
        assert!(refused(Condition { at_least: Some(0.0), ..on("language") }, &languages).contains("text or bytes"));
        assert!(refused(Condition { len_at_least: Some(0), ..on("score") }, &scores).contains("no length"));
    }
}
