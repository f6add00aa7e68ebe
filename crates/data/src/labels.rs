//! `labels.safetensors`: the ground truth.
//!
//! Kind `labels`, format version 1. Only `metrics`, `report` and `predict` read it; no training does.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `label` | `(N,)` u32 | class of each picture by row of `images.safetensors`; 4294967295 if unknown |
//! | `class-bytes` | `(B,)` u8 | names of the classes in UTF-8, one after the other |
//! | `class-offset` | `(C + 1,)` u64 | class `c` is `class-bytes[class-offset[c]..class-offset[c + 1]]` |
//!
//! Header: `images` and `fingerprint`, see [`DataSet`].

use std::path::Path;

use anyhow::{Context, Result, ensure};
use stage::container::{self, Column, Container, Tensor};

use crate::data_set::{DataSet, check_length};
use crate::names::{join, split};

const KIND: &str = "labels";
const VERSION: u64 = 1;

/// The label of a picture whose class is unknown.
const UNKNOWN: u32 = u32::MAX;

/// The class of every picture, where it is known.
#[derive(Debug, Clone)]
pub struct Labels {
    /// The pictures that are labelled.
    pub data_set: DataSet,
    /// The class of each by row, `N`, as an index into `classes`.
    pub labels: Vec<Option<u32>>,
    /// Names of the classes, `C`.
    pub classes: Vec<String>,
}

impl Labels {
    /// Writes the file.
    ///
    /// # Errors
    ///
    /// There are more or fewer labels than pictures, a label has no class, or the file cannot be
    /// written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check(path)?;
        let label: Vec<u32> = self.labels.iter().map(|label| label.unwrap_or(UNKNOWN)).collect();
        let (bytes, offset) = join(&self.classes);
        let tensors = [
            Tensor::u32("label", &[label.len()], &label),
            Tensor::u8("class-bytes", &[bytes.len()], &bytes),
            Tensor::u64("class-offset", &[offset.len()], &offset),
        ];
        container::write(path, KIND, VERSION, self.data_set.header(), &tensors)
    }

    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// It is missing, foreign or damaged, or a label has no class.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Container::open(path, KIND, VERSION)?;
        let label = file.u32("label")?;
        let read = Self {
            data_set: DataSet::of(&file)?,
            labels: label.iter().map(|&label| (label != UNKNOWN).then_some(label)).collect(),
            classes: split(path, &file.u8("class-bytes")?, &file.u64("class-offset")?)?,
        };
        read.check(path)?;
        Ok(read)
    }

    fn check(&self, path: &Path) -> Result<()> {
        check_length(path, "label", self.labels.len(), self.data_set.images)?;
        let classes = self.classes.len();
        for (row, label) in self.labels.iter().enumerate() {
            let label = label.unwrap_or(0) as usize;
            ensure!(
                label < classes.max(1),
                "`{}` gives picture {row} class {label}, but names {classes} classes; prepare the \
                 images again",
                path.display()
            );
        }
        Ok(())
    }
}

/// Writes `labels.safetensors` from labels in row order. Its memory does not grow with their
/// number.
#[derive(Debug)]
pub struct LabelsWriter {
    given: Column<u32>,
    label: Column<u32>,
}

impl LabelsWriter {
    /// Begins a file. Values wait in unnamed temporary files in `folder`.
    pub fn create_in(folder: &Path) -> Result<Self> {
        Ok(Self { given: Column::create_in(folder)?, label: Column::create_in(folder)? })
    }

    /// Appends the label of the next row, by the caller's own numbers of classes.
    pub fn push(&mut self, given: Option<u32>) -> Result<()> {
        self.given.push(&[given.unwrap_or(UNKNOWN)])
    }

    /// Writes the file. The caller's class `n` becomes number `numbers[n]`, whose name is
    /// `classes[numbers[n]]`.
    ///
    /// # Errors
    ///
    /// There are more or fewer labels than pictures, a label has no class, or the file cannot be
    /// written.
    pub fn finish(
        mut self,
        data_set: &DataSet,
        path: &Path,
        numbers: &[u32],
        classes: &[String],
    ) -> Result<()> {
        let count = usize::try_from(self.given.len())?;
        check_length(path, "label", count, data_set.images)?;
        let label = &mut self.label;
        self.given.each(|given| {
            let number = match given {
                UNKNOWN => UNKNOWN,
                given => *numbers
                    .get(given as usize)
                    .filter(|&&number| (number as usize) < classes.len())
                    .with_context(|| {
                        format!("label {given} for `{}` has no class", path.display())
                    })?,
            };
            label.push(&[number])
        })?;
        let (bytes, offset) = join(classes);
        let tensors = [
            self.label.tensor("label", &[count])?,
            Tensor::u8("class-bytes", &[bytes.len()], &bytes),
            Tensor::u64("class-offset", &[offset.len()], &offset),
        ];
        container::write(path, KIND, VERSION, data_set.header(), &tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_as_written_and_a_label_without_class_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("labels.safetensors");
        let data_set = DataSet { path: path.clone(), images: 3, fingerprint: "f".into() };
        let classes = ["cat", "dog"].map(String::from).to_vec();
        let mut written = Labels { data_set, labels: vec![Some(1), None, Some(0)], classes };
        written.write(&path).expect("written");
        let read = Labels::open(&path).expect("sound");
        assert_eq!(read.labels, written.labels);
        assert_eq!(read.classes, written.classes);

        let gathered = |labels: &[Option<u32>]| {
            let mut writer = LabelsWriter::create_in(folder.path()).expect("created");
            labels.iter().try_for_each(|&label| writer.push(label)).expect("added");
            writer.finish(&written.data_set, &path, &[1, 0], &written.classes)
        };
        gathered(&[Some(0), None, Some(1)]).expect("written");
        assert_eq!(Labels::open(&path).expect("sound").labels, written.labels);
        assert!(gathered(&[Some(0), None, Some(2)]).is_err());
        assert!(gathered(&[Some(0), None]).is_err());

        written.labels[2] = Some(2);
        let error = written.write(&path).expect_err("no class 2").to_string();
        assert!(error.contains("picture 2") && error.contains("labels.safetensors"), "{error}");
        written.labels.pop();
        assert!(written.write(&path).is_err());
    }
}
