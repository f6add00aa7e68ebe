//! The comparison of the sides of one work, and the table of all comparisons.

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{BenchArguments, History, Machine, Measurement, Side};

/// The unit of `ours` and `peer` of a [`Comparison`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchUnit {
    /// Amount per second, such as `images/s`: more is faster.
    PerSecond(&'static str),
    /// Seconds for the whole work: less is faster.
    Seconds,
}

impl BenchUnit {
    /// Returns the value of one turn.
    fn of(self, turn: &Measurement) -> f64 {
        match self {
            Self::PerSecond(_) => turn.amount / turn.seconds,
            Self::Seconds => turn.seconds,
        }
    }

    fn name(self) -> String {
        match self {
            Self::PerSecond(what) => format!("{what}/s"),
            Self::Seconds => "s".into(),
        }
    }
}

/// The sides of one work, compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Comparison {
    /// Name of the work.
    pub work: String,
    /// Further keys of the work, such as its size.
    #[serde(flatten)]
    pub keys: Map<String, Value>,
    /// Unit of `ours` and `peer`.
    pub unit: String,
    /// Median over the rounds.
    pub ours: f64,
    /// Median over the rounds, of the fastest peer.
    pub peer: Option<f64>,
    /// The peer's time divided by ours: median of the rounds' ratios.
    pub ratio: Option<f64>,
    /// The smallest of these ratios.
    pub ratio_min: Option<f64>,
    /// The largest of these ratios.
    pub ratio_max: Option<f64>,
    /// The peer's processor time divided by ours: median of the rounds' ratios.
    pub processor_ratio: Option<f64>,
    /// Peak memory of our process, in 10⁶ bytes.
    pub peak_mb: f64,
    /// Peak memory of the peer's process.
    pub peer_peak_mb: Option<f64>,
    /// Name of the fastest peer.
    pub peer_name: Option<String>,
    /// Note that the peer gave on itself.
    pub peer_note: Option<String>,
}

impl Comparison {
    /// Compares the turns of ours with those of the fastest peer.
    ///
    /// - `peers`: name, note and turns of each.
    pub fn new(
        work: &str,
        keys: Value,
        unit: BenchUnit,
        ours: &[Measurement],
        peers: &[(String, Option<String>, Vec<Measurement>)],
    ) -> Self {
        let of = |turns: &[Measurement]| median(turns.iter().map(|turn| unit.of(turn)).collect());
        let peer = peers.iter().min_by(|(_, _, a), (_, _, b)| speed(b).total_cmp(&speed(a)));
        let ratios = |value: fn(&Measurement) -> f64| -> Option<Vec<f64>> {
            let (_, _, peer) = peer?;
            let turns = ours.iter().zip(peer);
            let each = |(a, b)| (value(b) / b.amount) / (value(a) / a.amount);
            Some(turns.map(each).collect())
        };
        let by_clock = ratios(|turn| turn.seconds);
        let by_processor = ratios(|turn| turn.processor_seconds).map(median);
        Self {
            work: work.to_owned(),
            keys: keys.as_object().cloned().unwrap_or_default(),
            unit: unit.name(),
            ours: of(ours),
            peer: peer.map(|(_, _, turns)| of(turns)),
            ratio: by_clock.clone().map(median),
            ratio_min: by_clock.clone().map(|all| all.into_iter().fold(f64::INFINITY, f64::min)),
            ratio_max: by_clock.map(|all| all.into_iter().fold(0., f64::max)),
            processor_ratio: by_processor.filter(|ratio| ratio.is_finite()),
            peak_mb: peak(ours),
            peer_peak_mb: peer.map(|(_, _, turns)| peak(turns)),
            peer_name: peer.map(|(name, _, _)| name.clone()),
            peer_note: peer.and_then(|(_, note, _)| note.clone()),
        }
    }

    fn line(&self) -> String {
        let number = |value: Option<f64>| match value {
            None => "-".into(),
            Some(value) if value >= 100. => format!("{value:.0}"),
            Some(value) => format!("{value:.3}").chars().take(5).collect::<String>(),
        };
        let spread = match (self.ratio_min, self.ratio_max) {
            (Some(least), Some(most)) => format!("{least:.2}-{most:.2}"),
            _ => "-".into(),
        };
        let ratio = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        let peer = self.peer_name.as_deref().unwrap_or_default();
        let note = self.peer_note.as_deref().map(|note| format!(": {note}")).unwrap_or_default();
        format!(
            "{:44} {:>8} {:>8} {:9} {:>6} {:>11} {:>6} {:>8} {:>8}  {peer}{note}",
            self.work,
            number(Some(self.ours)),
            number(self.peer),
            self.unit,
            ratio(self.ratio),
            spread,
            ratio(self.processor_ratio),
            number(Some(self.peak_mb)),
            number(self.peer_peak_mb)
        )
        .trim_end()
        .to_owned()
    }
}

/// The heading of the table.
fn heading() -> String {
    format!(
        "{:44} {:>8} {:>8} {:9} {:>6} {:>11} {:>6} {:>8} {:>8}  peer",
        "work", "ours", "peer", "", "ratio", "range", "by cpu", "peak MB", "peer MB"
    )
}

/// Returns the median amount per second.
fn speed(turns: &[Measurement]) -> f64 {
    median(turns.iter().map(|turn| turn.amount / turn.seconds).collect())
}

fn peak(turns: &[Measurement]) -> f64 {
    turns.iter().map(|turn| turn.peak_mb).fold(0., f64::max)
}

/// Returns the middle value, or the mean of both middle ones; NaN for no values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.,
    }
}

/// Lets ours and the peers take turns for the given number of rounds.
///
/// - `keys`: further keys of the comparison, a JSON object.
///
/// # Errors
///
/// A side fails; the message ends with its stderr.
pub fn compare(
    arguments: &BenchArguments,
    work: &str,
    keys: Value,
    unit: BenchUnit,
    mut ours: Side,
    mut peers: Vec<Side>,
) -> Result<Comparison> {
    // One after the other, because only one side may use the machine at a time.
    ours.wait_until_ready()?;
    peers.iter_mut().try_for_each(Side::wait_until_ready)?;
    let (mut our_turns, mut turns) = (Vec::new(), vec![Vec::new(); peers.len()]);
    for _ in 0..arguments.rounds {
        our_turns.push(ours.turn()?);
        for (peer, turns) in peers.iter_mut().zip(&mut turns) {
            turns.push(peer.turn()?);
        }
    }
    let named = peers
        .iter()
        .zip(turns)
        .map(|(peer, turns)| (peer.name().to_owned(), peer.note().map(str::to_owned), turns));
    Ok(Comparison::new(work, keys, unit, &our_turns, &named.collect::<Vec<_>>()))
}

/// Prints comparisons one by one, and with JSON all of them at the end.
#[derive(Debug)]
pub struct ComparisonTable {
    rows: Vec<Comparison>,
    machine: Machine,
    history: Option<History>,
    json: bool,
}

impl ComparisonTable {
    /// A table without rows. Inspects the machine and prints it.
    ///
    /// # Errors
    ///
    /// The history is damaged.
    pub fn new(arguments: &BenchArguments) -> Result<Self> {
        let machine = Machine::inspect();
        println!("{machine}");
        let open = |path| {
            let commit = arguments.commit.as_deref().unwrap_or_default();
            History::open(path, commit, arguments.threads(), &machine)
        };
        let history = arguments.history.as_deref().map(open).transpose()?;
        Ok(Self { rows: Vec::new(), machine, history, json: arguments.json })
    }

    /// Adds a row and prints its line.
    ///
    /// # Errors
    ///
    /// The history cannot be written.
    pub fn add(&mut self, row: Comparison) -> Result<()> {
        if self.rows.is_empty() {
            println!("{}", heading());
        }
        let before = self.history.as_ref().and_then(|history| history.compared(&row));
        let before = before.map(|before| format!("  [{before}]")).unwrap_or_default();
        println!("{}{before}", row.line());
        if let Some(history) = &self.history {
            history.append(&row)?;
        }
        self.rows.push(row);
        Ok(())
    }

    /// Prints the JSON object, if asked for.
    ///
    /// # Errors
    ///
    /// There is no row, because `--only` selects no work.
    pub fn finish(self) -> Result<()> {
        ensure!(!self.rows.is_empty(), "--only selects no work; leave it out to measure all");
        if self.json {
            println!("{}", json!({ "machine": self.machine, "rows": self.rows }));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(seconds: &[f64], amount: f64) -> Vec<Measurement> {
        let turn = |(i, &seconds)| Measurement {
            seconds,
            processor_seconds: 2. * seconds,
            amount,
            peak_mb: 100. + i as f64,
        };
        seconds.iter().enumerate().map(turn).collect()
    }

    #[test]
    fn a_ratio_is_above_one_when_ours_is_faster_in_a_round() {
        let ours = turns(&[1., 2., 4.], 8.);
        let slow = ("slow".to_owned(), None, turns(&[9., 9., 9.], 8.));
        let fast = ("fast".to_owned(), Some("eager".to_owned()), turns(&[3., 3., 16.], 8.));
        let row = |unit| {
            Comparison::new("w", json!({ "batch": 7 }), unit, &ours, &[slow.clone(), fast.clone()])
        };
        let rate = row(BenchUnit::PerSecond("images"));
        // Ratios of the rounds: 3, 1.5, 4.
        assert_eq!((rate.ratio, rate.ratio_min, rate.ratio_max), (Some(3.), Some(1.5), Some(4.)));
        assert_eq!(rate.processor_ratio, Some(3.));
        assert_eq!((rate.ours, rate.peer), (4., Some(8. / 3.)));
        assert_eq!((rate.peak_mb, rate.peer_peak_mb), (102., Some(102.)));
        assert_eq!(rate.peer_name.as_deref(), Some("fast"));
        let seconds = row(BenchUnit::Seconds);
        assert_eq!((seconds.ours, seconds.peer, seconds.ratio), (2., Some(3.), Some(3.)));

        let text = serde_json::to_value(&rate).expect("JSON");
        for key in [
            "work",
            "unit",
            "ours",
            "peer",
            "ratio",
            "ratio-min",
            "ratio-max",
            "peak-mb",
            "peer-peak-mb",
            "peer-name",
            "peer-note",
            "batch",
        ] {
            assert!(text.get(key).is_some(), "{key} is not in {text}");
        }
        assert!(rate.line().ends_with("fast: eager"), "{}", rate.line());
        assert!(rate.line().contains(" 3.00   1.50-4.00"), "{}", rate.line());
    }

    #[test]
    fn sides_that_do_unequal_amounts_are_compared_by_amount() {
        let peer = ("peer".to_owned(), None, turns(&[1.], 5.));
        let row = Comparison::new(
            "w",
            json!({}),
            BenchUnit::PerSecond("images"),
            &turns(&[1.], 10.),
            &[peer],
        );
        assert_eq!(row.ratio, Some(2.));
    }

    #[test]
    fn without_a_peer_there_is_no_ratio() {
        let row = Comparison::new("w", json!({}), BenchUnit::Seconds, &turns(&[2., 1.], 1.), &[]);
        assert_eq!((row.ours, row.ratio, row.peer_name.as_deref()), (1.5, None, None));
        assert!(serde_json::to_value(&row).expect("JSON")["ratio"].is_null());
        let arguments = BenchArguments {
            peer_python: None,
            json: true,
            only: String::new(),
            rounds: 1,
            threads: None,
            history: None,
            commit: None,
        };
        let table = ComparisonTable::new(&arguments).expect("no history");
        assert!(table.finish().is_err());
    }
}
