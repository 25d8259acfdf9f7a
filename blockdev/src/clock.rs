//! The only place that reads a clock; everything else takes its time from here.

#![allow(clippy::disallowed_methods)]

use std::time::{Instant, SystemTime};

/// Monotonic time, for latencies and deadlines. On the data path prefer [`crate::Reactor::now`], which is read once a batch.
pub fn monotonic() -> Instant {
    Instant::now()
}

/// Calendar time, for what people read.
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// `2026-11-22T21:14:03Z`, from seconds since 1970.
pub fn format_utc(unix: u64) -> String {
    let (days, second) = ((unix / 86_400) as i64, unix % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written() {
        assert_eq!(format_utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(format_utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(format_utc(4_107_542_399), "2100-02-28T23:59:59Z");
    }
}
