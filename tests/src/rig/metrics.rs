//! One scrape of a Prometheus endpoint.

use anyhow::{Context, Result, bail};

#[derive(Debug, Clone)]
pub struct Metrics {
    text: String,
}

impl Metrics {
    pub fn new(text: String) -> Self {
        Self { text }
    }

    /// The sum of all series of this name that carry these labels; there must be one at least.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let wanted: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let of_name: Vec<(&str, &str)> =
            self.text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")).collect();
        let matching = of_name.iter().filter(|(labels, _)| {
            let labels: Vec<&str> = labels.split(',').collect();
            wanted.iter().all(|label| labels.contains(&label.as_str()))
        });
        let values: Result<Vec<f64>> =
            matching.map(|(_, value)| value.trim().parse().with_context(|| format!("{name} is {value:?}"))).collect();
        let values = values?;
        if values.is_empty() {
            bail!("no {name} with {wanted:?} among {of_name:?}");
        }
        Ok(values.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_found_by_their_labels_in_any_order() {
        let metrics = Metrics::new("# HELP a\na{v=\"x\",op=\"read\"} 3\na{v=\"y\",op=\"read\"} 4\nab{v=\"x\"} 9\n".to_owned());
        assert_eq!(metrics.sum("a", &[("op", "read"), ("v", "x")]).unwrap(), 3.0);
        assert_eq!(metrics.sum("a", &[("op", "read")]).unwrap(), 7.0);
        assert!(metrics.sum("a", &[("op", "write")]).is_err());
    }
}
