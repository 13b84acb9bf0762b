//! Options of zoo networks: named settings with defaults.

use std::fmt;

/// The value of an option.
#[derive(Debug, Clone, PartialEq)]
pub enum Setting {
    /// A count or a size.
    Integer(usize),
    /// Several counts.
    Integers(Vec<usize>),
    /// A ratio.
    Float(f64),
    /// Yes or no.
    Flag(bool),
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Setting::Integer(v) => write!(f, "{v}"),
            Setting::Integers(v) => {
                let shown: Vec<String> = v.iter().map(usize::to_string).collect();
                f.write_str(&shown.join(","))
            }
            Setting::Float(v) => write!(f, "{v}"),
            Setting::Flag(v) => write!(f, "{v}"),
        }
    }
}

/// One option of a network.
pub struct OptionFact {
    /// What users call it.
    pub name: &'static str,
    /// The value if none is given, as text: its form is the option's kind.
    pub default: Default,
    /// One line: what it means.
    pub meaning: &'static str,
}

/// A default that can stand in a constant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Default {
    /// A count or a size.
    Integer(usize),
    /// Several counts.
    Integers(&'static [usize]),
    /// A ratio.
    Float(f64),
    /// Yes or no.
    Flag(bool),
}

impl Default {
    /// The same as a setting.
    pub fn setting(self) -> Setting {
        match self {
            Default::Integer(v) => Setting::Integer(v),
            Default::Integers(v) => Setting::Integers(v.to_vec()),
            Default::Float(v) => Setting::Float(v),
            Default::Flag(v) => Setting::Flag(v),
        }
    }
}

pub(super) const fn integer(name: &'static str, default: usize, meaning: &'static str) -> OptionFact {
    OptionFact { name, default: Default::Integer(default), meaning }
}

pub(super) const fn integers(name: &'static str, default: &'static [usize], meaning: &'static str) -> OptionFact {
    OptionFact { name, default: Default::Integers(default), meaning }
}

pub(super) const fn float(name: &'static str, default: f64, meaning: &'static str) -> OptionFact {
    OptionFact { name, default: Default::Float(default), meaning }
}

pub(super) const fn flag(name: &'static str, default: bool, meaning: &'static str) -> OptionFact {
    OptionFact { name, default: Default::Flag(default), meaning }
}

/// Why an option was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OptionsError {
    /// The network has no such option.
    #[error("{network} has no option {name:?}{}; it has {known}", nearest.map(|n| format!(" (did you mean {n:?}?)")).unwrap_or_default())]
    Unknown {
        /// The network.
        network: &'static str,
        /// What was given.
        name: String,
        /// The most similar option, if one is similar.
        nearest: Option<&'static str>,
        /// All options.
        known: String,
    },
    /// The value is of another kind.
    #[error("option {name:?} of {network} is {expected}, found {found}")]
    Kind {
        /// The network.
        network: &'static str,
        /// The option.
        name: String,
        /// Its kind.
        expected: &'static str,
        /// What was given.
        found: String,
    },
}

/// A value for each option of one network.
#[derive(Debug, Clone, PartialEq)]
pub struct Options(Vec<(&'static str, Setting)>);

impl Options {
    /// The options of `entry`: those given, defaults for the rest.
    pub fn of(entry: &super::Entry, given: &[(String, Setting)]) -> Result<Options, OptionsError> {
        let mut all: Vec<(&'static str, Setting)> =
            entry.options.iter().map(|o| (o.name, o.default.setting())).collect();
        for (name, setting) in given {
            let Some((_, slot)) = all.iter_mut().find(|(n, _)| n == name) else {
                return Err(OptionsError::Unknown {
                    network: entry.name,
                    name: name.clone(),
                    nearest: updraft_base::nearest(name, entry.options.iter().map(|o| o.name)),
                    known: entry.options.iter().map(|o| o.name).collect::<Vec<_>>().join(", "),
                });
            };
            *slot = match (&*slot, setting) {
                (Setting::Integer(_), Setting::Integer(v)) => Setting::Integer(*v),
                (Setting::Integers(_), Setting::Integers(v)) => Setting::Integers(v.clone()),
                (Setting::Integers(_), Setting::Integer(v)) => Setting::Integers(vec![*v]),
                (Setting::Float(_), Setting::Float(v)) => Setting::Float(*v),
                (Setting::Float(_), Setting::Integer(v)) => Setting::Float(*v as f64),
                (Setting::Flag(_), Setting::Flag(v)) => Setting::Flag(*v),
                (expected, found) => {
                    return Err(OptionsError::Kind {
                        network: entry.name,
                        name: name.clone(),
                        expected: match expected {
                            Setting::Integer(_) => "an integer",
                            Setting::Integers(_) => "a list of integers",
                            Setting::Float(_) => "a number",
                            Setting::Flag(_) => "true or false",
                        },
                        found: found.to_string(),
                    });
                }
            };
        }
        Ok(Options(all))
    }

    /// Names and values, in the entry's order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Setting)> {
        self.0.iter().map(|(n, s)| (*n, s))
    }

    fn get(&self, name: &str) -> Option<&Setting> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, s)| s)
    }

    pub(super) fn integer(&self, name: &str) -> usize {
        match self.get(name) {
            Some(Setting::Integer(v)) => *v,
            _ => unreachable!("the entry declares integer option {name}"),
        }
    }

    pub(super) fn integers(&self, name: &str) -> &[usize] {
        match self.get(name) {
            Some(Setting::Integers(v)) => v,
            _ => unreachable!("the entry declares list option {name}"),
        }
    }

    pub(super) fn float(&self, name: &str) -> f64 {
        match self.get(name) {
            Some(Setting::Float(v)) => *v,
            _ => unreachable!("the entry declares float option {name}"),
        }
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        match self.get(name) {
            Some(Setting::Flag(v)) => *v,
            _ => unreachable!("the entry declares flag option {name}"),
        }
    }
}
