//! What std lacks: clock, seeded randomness, digests, units.
