//! What std lacks: clock, seeded randomness, digests, units, and the nearest known word for an unknown one.

pub mod clock;
pub mod digest;
pub mod random;
pub mod units;

mod nearest;

pub use clock::{Clock, FakeClock, SystemClock};
pub use digest::{Digest, Hasher, ParseDigestError};
pub use nearest::nearest;
pub use random::{Key, Permutation};
