//! Searches the simulated world for schedules that break the engine: `simulate [--seeds N] [--seed S]`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use volume::simulation::{self, Seen};

fn main() -> ExitCode {
    match arguments() {
        Ok((first, count)) => search(first, count),
        Err(why) => {
            eprintln!("{why}\nusage: simulate [--seeds N] [--seed FIRST]");
            ExitCode::from(2)
        }
    }
}

/// The first seed, which is a fresh one unless given, and how many to try.
fn arguments() -> Result<(u64, u64), String> {
    let (mut first, mut count) = (None, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or(format!("{word} needs a number"))?;
        let number = value.parse::<u64>().map_err(|error| format!("{word} {value}: {error}"))?;
        match word.as_str() {
            "--seed" => first = Some(number),
            "--seeds" => count = Some(number),
            _ => return Err(format!("unknown option {word}")),
        }
    }
    let fresh = || blockdev::clock::wall().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
    let count = count.unwrap_or(if first.is_some() { 1 } else { 1000 });
    Ok((first.unwrap_or_else(fresh), count))
}

fn search(first: u64, count: u64) -> ExitCode {
    println!("seeds {first} to {}", first.wrapping_add(count - 1));
    let (next, broken) = (AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new(Seen::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !broken.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    let seed = first.wrapping_add(index);
                    match std::panic::catch_unwind(|| simulation::run(seed, count == 1))
                        .unwrap_or_else(|_| Err("it panicked".to_owned()))
                    {
                        Ok(seen) => *total.lock().unwrap_or_else(PoisonError::into_inner) += seen,
                        Err(why) => {
                            broken.store(true, Ordering::Relaxed);
                            println!("BROKEN: {why}\nagain with: cargo xtask simulate --seed {seed}");
                        }
                    }
                }
            });
        }
    });
    print!("{}", total.into_inner().unwrap_or_else(PoisonError::into_inner));
    if broken.into_inner() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
