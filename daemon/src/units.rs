//! Sizes, rates and times as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use blockdev::clock::format_utc as format_time;

/// Parses `10G`, `512MiB`, `4096`: powers of 1024 whatever the spelling. Fractions such as `1.5G` are allowed where they come
/// out even.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: write 10G, 512MiB or bytes");
    let trimmed = text.trim();
    let unit_start = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(unit_start);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 6 || number.ends_with('.') || fraction.contains('.') {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let scale = 10u128.pow(fraction.len() as u32);
    let parts: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
    let scaled = whole.checked_mul(scale).and_then(|value| value.checked_add(parts)).ok_or_else(wrong)?;
    let bytes = scaled.checked_mul(1 << shift).ok_or_else(wrong)?;
    if bytes % scale != 0 {
        return Err(format!("{text:?} is no whole number of bytes"));
    }
    u64::try_from(bytes / scale).map_err(|_| format!("{text:?} is too large"))
}

/// `10G`, `1.5G`, `512`: with at most two decimals.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 5] = [(50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")];
    for (shift, unit) in UNITS {
        if bytes >> shift > 0 {
            let whole = bytes as f64 / (1u64 << shift) as f64;
            let text = format!("{whole:.2}");
            return format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'));
        }
    }
    bytes.to_string()
}

/// The same with its unit spelled for rates: `512 B/s`, `1.5 MiB/s`.
pub fn format_rate(bytes_per_second: f64) -> String {
    const UNITS: [&str; 4] = ["B/s", "KiB/s", "MiB/s", "GiB/s"];
    let mut value = bytes_per_second;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Seconds since 1970, now.
pub fn now_unix() -> u64 {
    unix_seconds(blockdev::clock::wall())
}

/// `950ns`, `12.3µs`, `4.56ms`, `1.20s`.
pub fn format_latency(latency: Duration) -> String {
    let nanos = latency.as_nanos() as f64;
    match nanos {
        n if n < 1e3 => format!("{n:.0}ns"),
        n if n < 1e6 => format!("{:.1}µs", n / 1e3),
        n if n < 1e9 => format!("{:.2}ms", n / 1e6),
        n => format!("{:.2}s", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("10G", 10 << 30),
            ("512MiB", 512 << 20),
            ("4096", 4096),
            ("1.5g", 3 << 29),
            (" 2 TiB ", 2 << 40),
            ("0", 0),
            ("0.5K", 512),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1X", "1.", ".5", "1.2.3G", "1e3", "99999999999P", "0.3", "１G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written() {
        for (bytes, text) in [(0, "0"), (512, "512"), (10 << 30, "10G"), (3 << 29, "1.5G"), (1 << 60, "1024P")] {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn times_are_written() {
        assert_eq!(format_latency(Duration::from_nanos(12_345)), "12.3µs");
    }
}
