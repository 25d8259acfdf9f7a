//! How fast AES-256-XTS is on one core, beside a plain copy: `cargo run --release -p blockdev --features encryption --example encryption`.
//!
//! For each size of request and of data unit: encrypting and decrypting in place, as the layer does, and copying, which it does too.

use std::hint::black_box;

use blockdev::layers::xts::Xts;
use blockdev::{BufferPool, Memory, clock};

const GIB: f64 = (1_u64 << 30) as f64;
const MOMENTS: usize = 400;
const MOMENT_BYTES: usize = 2 << 20;

fn main() {
    let key = std::array::from_fn(|index| index as u8);
    let mut cipher = Xts::new(&key).expect("both halves of the key differ");
    println!("request  unit   encrypt  decrypt     copy   copy + encrypt   GiB/s");
    for len in [4 << 10, 128 << 10] {
        let pool = BufferPool::new(4 * len, 4 * len);
        let [mut memory, mut source] = [(); 2].map(|()| Memory::from_buffer(pool.try_get(len).expect("within budget"), len));
        memory.fill(1);
        source.fill(2);
        for unit in [512, 4096] {
            let encrypt = speed(len, || units(len, unit, |at, number| cipher.encrypt(&mut memory, at, unit, number)));
            let decrypt = speed(len, || units(len, unit, |at, number| cipher.decrypt(&mut memory, at, unit, number)));
            let copy = speed(len, || memory.copy_memory(0, black_box(&source), 0, len));
            let both = speed(len, || {
                memory.copy_memory(0, black_box(&source), 0, len);
                units(len, unit, |at, number| cipher.encrypt(&mut memory, at, unit, number));
            });
            println!("{:4} KiB {unit:5} {encrypt:9.2} {decrypt:8.2} {copy:8.2} {both:16.2}", len >> 10);
        }
    }
}

fn units(len: usize, unit: usize, mut each: impl FnMut(usize, u64)) {
    (0..len).step_by(unit).zip(0..).for_each(|(at, number)| each(at, number));
}

/// GiB a second of work on `len` bytes: the best of many moments, most of which nothing else on the machine interrupts.
fn speed(len: usize, mut work: impl FnMut()) -> f64 {
    let rounds = MOMENT_BYTES / len;
    let moment = || {
        let began = clock::monotonic();
        (0..rounds).for_each(|_| work());
        (rounds * len) as f64 / GIB / (clock::monotonic() - began).as_secs_f64()
    };
    std::iter::repeat_with(moment).take(MOMENTS).fold(0.0, f64::max)
}
