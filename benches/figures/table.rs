//! The table: one line per row, printed as soon as it is known.

/// Prints rows.
pub struct Table;

/// The middle of some numbers (the lower one of two).
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
        .get(sorted.len().saturating_sub(1) / 2)
        .copied()
        .unwrap_or(f64::NAN)
}

fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

impl Table {
    pub fn new() -> Table {
        println!(
            "{:<52} {:>9} {:>9} {:>9} {:<5} {:>2}  {:<10} ratio, remarks",
            "", "median", "least", "most", "", "n", "goal"
        );
        Table
    }

    /// A new group.
    pub fn begin(&mut self, name: &str) {
        println!("{name}");
    }

    /// A row; returns its median.
    pub fn row(&mut self, name: &str, unit: &str, samples: &[f64], goal: &str, remark: &str) -> f64 {
        let middle = median(samples);
        let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        println!(
            "  {name:<50} {:>9} {:>9} {:>9} {unit:<5} {:>2}  {goal:<10} {remark}",
            number(middle),
            number(least),
            number(most),
            samples.len(),
        );
        middle
    }

    /// A row that has no number, and why.
    pub fn absent(&mut self, name: &str, why: &str) {
        println!("  {name:<50} {:>9} {why}", "-");
    }

    /// A group ended early.
    pub fn failed(&mut self, error: &dyn std::error::Error) {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        println!("  FAILED: {text}");
    }
}
