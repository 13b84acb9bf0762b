//! Which requests fetch which ranges.
//!
//! A request costs its latency, whatever it fetches, so near ranges share one. A large range is cut into parts that are
//! fetched side by side, because one connection is slower than the store.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// The requests for some ranges, and where each range lies in their answers.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    /// What to fetch; each is at most a part long.
    pub(super) fetches: Vec<Range<u64>>,
    /// For each range asked for, in order: the fetches it lies in, consecutive ones where it is larger than a part.
    places: Vec<Range<usize>>,
}

/// Plans the fetches of `ranges`: those at most `gap_bytes` apart together, none longer than `part_bytes`.
pub(super) fn plan(ranges: &[Range<u64>], gap_bytes: u64, part_bytes: u64) -> Plan {
    let part_bytes = part_bytes.max(1);
    let mut order: Vec<usize> = (0..ranges.len()).filter(|&i| !ranges[i].is_empty()).collect();
    order.sort_unstable_by_key(|&i| (ranges[i].start, ranges[i].end));
    let mut fetches: Vec<Range<u64>> = Vec::new();
    let mut places = vec![0..0; ranges.len()];
    // The last fetch takes further ranges, unless it is a part of a range that was cut.
    let mut open = false;
    for i in order {
        let range = &ranges[i];
        if open
            && let Some(last) = fetches.last_mut()
            && range.start <= last.end.saturating_add(gap_bytes)
            && range.end.max(last.end) - last.start <= part_bytes
        {
            last.end = last.end.max(range.end);
            places[i] = fetches.len() - 1..fetches.len();
            continue;
        }
        let first = fetches.len();
        let mut start = range.start;
        while range.end - start > part_bytes {
            fetches.push(start..start + part_bytes);
            start += part_bytes;
        }
        fetches.push(start..range.end);
        open = fetches.len() == first + 1;
        places[i] = first..fetches.len();
    }
    Plan { fetches, places }
}

impl Plan {
    /// The ranges asked for, from the answers of all fetches; only a range that was cut is copied.
    pub(super) fn assemble(&self, ranges: &[Range<u64>], answers: &[Bytes]) -> Vec<Bytes> {
        let slice = |range: &Range<u64>, place: &Range<usize>| match place.len() {
            0 => Bytes::new(),
            1 => {
                let from = (range.start - self.fetches[place.start].start) as usize;
                answers[place.start].slice(from..from + (range.end - range.start) as usize)
            }
            _ => {
                let mut whole = BytesMut::with_capacity((range.end - range.start) as usize);
                answers[place.clone()].iter().for_each(|part| whole.extend_from_slice(part));
                whole.freeze()
            }
        };
        ranges.iter().zip(&self.places).map(|(range, place)| slice(range, place)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_ranges_share_a_fetch_and_far_ones_do_not() {
        let plan = plan(&[50..60, 0..10, 20..30, 200..210], 20, 1000);
        assert_eq!(plan.fetches, [0..60, 200..210]);
    }

    #[test]
    fn no_fetch_is_longer_than_a_part() {
        let plan = plan(&[0..10, 10..95, 95..120, 120..130], 50, 100);
        assert_eq!(plan.fetches, [0..95, 95..130]);
        let cut = super::plan(&[5..255, 255..260], 50, 100);
        assert_eq!(cut.fetches, [5..105, 105..205, 205..255, 255..260]);
    }

    #[test]
    fn whatever_is_planned_gives_the_bytes_asked_for() {
        let object: Vec<u8> = (0..4096u32).map(|i| (i * 31 % 251) as u8).collect();
        let key = updraft_base::Key::new(3);
        let mut counter = 0;
        let mut draw = |n| {
            counter += 1;
            key.below(counter, n)
        };
        for _ in 0..500 {
            let ranges: Vec<Range<u64>> = (0..draw(12))
                .map(|_| {
                    let start = draw(4096);
                    start..start + draw(4097 - start)
                })
                .collect();
            let plan = plan(&ranges, draw(300), 1 + draw(900));
            let answers: Vec<Bytes> = plan
                .fetches
                .iter()
                .map(|f| Bytes::copy_from_slice(&object[f.start as usize..f.end as usize]))
                .collect();
            for (range, bytes) in ranges.iter().zip(plan.assemble(&ranges, &answers)) {
                assert_eq!(bytes, object[range.start as usize..range.end as usize], "{range:?} of {plan:?}");
            }
        }
    }
}
