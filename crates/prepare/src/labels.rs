//! Which class a picture has, where its source has a label and a file name for it.

use std::collections::BTreeMap;

/// The most classes a source may have. What has more is no ground truth, such as a column of
/// names, and would take memory without end.
pub const MOST_CLASSES: usize = 1 << 16;

/// The class of a picture that is labelled `label` and whose file has one of these names.
///
/// No label, an empty one and −1 say that the class is not known: −1 is what crate `datasets` of
/// Python, tensorflow-datasets and torchvision write there.
///
/// The published subsets of ILSVRC-2012 name classes by their WordNet ids, such as `n02085936`, and
/// copies of it label by number or by words but keep the id in the names of files. So where the
/// experiment asks for such ids and the label is none of `classes`, the id in a name is the class.
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

/// Names of classes by number, each of which occurs once: a name that several classes have is followed
/// by the number.
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
    fn an_id_in_the_name_of_a_file_is_the_class_where_the_experiment_asks_for_ids() {
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
    fn minus_one_is_no_class() {
        for label in ["-1", ""] {
            assert_eq!(class_for(Some(label.into()), &[""], &[]), None);
        }
        assert_eq!(class_for(Some("0".into()), &[""], &[]).as_deref(), Some("0"));
    }

    #[test]
    fn classes_of_one_name_stay_two_classes() {
        // ImageNet has two classes `crane` and two `maillot`.
        let names = ["crane", "cat", "crane"].map(String::from).to_vec();
        assert_eq!(distinct(names), ["crane (0)", "cat", "crane (2)"]);
    }
}
