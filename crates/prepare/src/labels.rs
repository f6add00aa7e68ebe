//! Decides a picture's class from its label and its file name.

use std::collections::BTreeMap;

/// The most classes that a source may have. A column with more values is not ground truth (names,
/// for example), and would need unbounded memory.
pub const MOST_CLASSES: usize = 1 << 16;

/// Returns the class of a picture with this label whose file has one of these names.
///
/// A missing label, an empty one and −1 mean that the class is unknown: Python's `datasets`,
/// tensorflow-datasets and torchvision write −1.
///
/// The published subsets of ILSVRC-2012 name classes by WordNet id, such as `n02085936`. Copies of
/// it use numbers or words as labels but keep the id in file names. So if `classes` are such ids
/// and the label is not one of them, the id in a file name is the class.
pub fn class_for(label: Option<String>, names: &[&str], classes: &[String]) -> Option<String> {
    let label = label.filter(|label| !label.is_empty() && label != "-1");
    let asks_for_ids = !classes.is_empty() && classes.iter().all(|class| is_id(class));
    let is_class = label.as_ref().is_some_and(|label| classes.contains(label));
    if asks_for_ids && !is_class {
        let mut parts = names.iter().flat_map(|name| name.split(['_', '/', '.']));
        if let Some(id) = parts.rfind(|part| is_id(part)) {
            return Some(id.to_owned());
        }
    }
    label
}

/// Makes class names unique: appends the class number to a name that several classes share.
pub fn distinct(names: Vec<String>) -> Vec<String> {
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for name in &names {
        *times.entry(name.clone()).or_default() += 1;
    }
    let with_number = |(number, name): (usize, String)| match times[&name] {
        1 => name,
        _ => format!("{name} ({number})"),
    };
    names.into_iter().enumerate().map(with_number).collect()
}

/// `n` and eight digits.
fn is_id(text: &str) -> bool {
    text.strip_prefix('n')
        .is_some_and(|digits| digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_in_a_file_name_is_the_class_if_the_experiment_asks_for_ids() {
        let ids = ["n02085936", "n02086646"].map(String::from);
        let label = || Some("Maltese dog".to_owned());
        let names = ["shard/n02085936_7_n02085936.JPEG", ""];
        assert_eq!(class_for(label(), &names, &ids).as_deref(), Some("n02085936"));
        assert_eq!(class_for(label(), &names, &[]), label());
        assert_eq!(class_for(label(), &["7.jpg"], &ids), label());
        let words = ["Maltese dog", "basset"].map(String::from);
        assert_eq!(class_for(label(), &names, &words), label());
        assert_eq!(class_for(None, &names, &ids).as_deref(), Some("n02085936"));
        assert_eq!(class_for(None, &["x"], &ids), None);
    }

    #[test]
    fn minus_one_means_unknown() {
        for label in ["-1", ""] {
            assert_eq!(class_for(Some(label.into()), &[""], &[]), None);
        }
        assert_eq!(class_for(Some("0".into()), &[""], &[]).as_deref(), Some("0"));
    }

    #[test]
    fn classes_that_share_a_name_stay_separate() {
        // ImageNet has two classes `crane` and two `maillot`.
        let names = ["crane", "cat", "crane"].map(String::from).to_vec();
        assert_eq!(distinct(names), ["crane (0)", "cat", "crane (2)"]);
    }
}
