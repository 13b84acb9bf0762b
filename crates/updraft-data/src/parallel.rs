//! Work cut into numbered parts, done by threads, and taken in the order of the numbers.

use std::sync::mpsc::sync_channel;

/// Parts that a thread may be ahead of whoever takes them: it goes on while another's long part is waited for, and memory
/// holds no more than three parts of each thread.
const AHEAD: usize = 1;

/// Does `count` parts on `threads` threads and gives the results to `take`, in order, on this thread. The first error ends
/// the work.
///
/// Part `i` is done by thread `i mod threads`, so what is taken next is always at the head of a known queue.
pub(crate) fn in_order<T: Send, E: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
    mut take: impl FnMut(usize, T) -> Result<(), E>,
) -> Result<(), E> {
    let threads = threads.clamp(1, count.max(1));
    std::thread::scope(|scope| {
        let work = &work;
        let queues: Vec<_> = (0..threads)
            .map(|thread| {
                let (sender, receiver) = sync_channel(AHEAD);
                scope.spawn(move || {
                    for part in (thread..count).step_by(threads) {
                        let done = work(part);
                        let is_last = done.is_err();
                        // Nobody receives any more when another part has failed.
                        if sender.send(done).is_err() || is_last {
                            break;
                        }
                    }
                });
                receiver
            })
            .collect();
        for part in 0..count {
            // A queue without a sender is that of a thread that panicked, and the scope hands its panic on.
            let Ok(done) = queues[part % threads].recv() else { break };
            take(part, done?)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::in_order;

    #[test]
    fn results_come_in_order_and_the_first_error_ends_the_work() {
        for threads in [1, 2, 3, 8] {
            let mut taken = Vec::new();
            let result = in_order(
                20,
                threads,
                |part| if part == 13 { Err(part) } else { Ok(part * part) },
                |part, square| {
                    taken.push((part, square));
                    Ok(())
                },
            );
            assert_eq!(result, Err(13));
            assert_eq!(taken, (0..13).map(|p| (p, p * p)).collect::<Vec<_>>(), "{threads} threads");
            assert_eq!(in_order(0, threads, Err::<(), usize>, |_, ()| Ok(())), Ok(()));
        }
    }
}
