//! The program `export`: a run's embeddings and clusters for other tools.
//!
//! `assort export RUN --format npy|parquet` starts it. Both forms have a row per picture, in the order of
//! `embeddings.safetensors`.
//!
//! - `npy`: `embeddings.npy`, a matrix `(N, D)` of little-endian f32 in NumPy's format; `names.json`, a list
//!   of the `N` names; and `clusters.npy`, `(N,)` of little-endian u32, where the run has clusters.
//! - `parquet`: `embeddings.parquet` with the columns `name`, a text; `cluster`, an i32, null where the run
//!   has no clusters; and `embedding`, a list of f32.

use std::ffi::OsString;
use std::fs;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use data::corrections::PictureMark;
use data::{Embeddings, Names, PseudoLabels, Space};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, FloatType, Int32Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use stage::console::{print_line, printable, start_logging};
use stage::container::Floats;

use crate::clusters::{Cluster, ClusterMember};

/// Writes a run's embeddings and clusters for other tools.
#[derive(Debug, Clone, Parser)]
#[command(name = "export", version)]
pub struct ExportArguments {
    /// The output of `embed`: embeddings.safetensors.
    #[arg(long, value_name = "FILE")]
    pub embeddings: PathBuf,
    /// The names of the pictures: names.safetensors.
    #[arg(long, value_name = "FILE")]
    pub names: PathBuf,
    /// The clusters of the pictures: pseudo-labels.safetensors.
    #[arg(long, value_name = "FILE")]
    pub pseudo_labels: Option<PathBuf>,
    /// The form of the files.
    #[arg(long)]
    pub format: ExportFormat,
    /// Rows to write: `backbone`, the embeddings, or `projection`, their projections.
    #[arg(long, default_value = "backbone", value_parser = space)]
    pub space: Space,
    /// Folder to write into; created if missing.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// The form of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// NumPy's arrays.
    Npy,
    /// One table.
    Parquet,
}

fn space(word: &str) -> Result<Space, String> {
    match word {
        "backbone" => Ok(Space::Backbone),
        "projection" => Ok(Space::Projection),
        _ => Err("must be backbone or projection".into()),
    }
}

/// The program: the command line `words` in, the exit status out.
pub fn program(words: Vec<OsString>) -> ExitCode {
    start_logging();
    let print = |path: &PathBuf| print_line(printable(&path.to_string_lossy()));
    let result = run(&ExportArguments::parse_from(words))
        .and_then(|written| written.iter().try_for_each(print));
    stage::finish("export", &result)
}

/// Writes the files and returns their paths.
///
/// # Errors
///
/// An input is missing or damaged, the inputs are about different pictures, or a file cannot be written.
pub fn run(arguments: &ExportArguments) -> Result<Vec<PathBuf>> {
    let table = ExportTable::open(arguments)?;
    let out = &arguments.out;
    fs::create_dir_all(out).with_context(|| format!("creating `{}`", out.display()))?;
    match arguments.format {
        ExportFormat::Npy => table.write_npy(out),
        ExportFormat::Parquet => table.write_parquet(out),
    }
}

/// What is exported of `N` pictures.
struct ExportTable {
    /// `(N,)`.
    names: Vec<String>,
    /// `(N,)`.
    clusters: Option<Vec<u32>>,
    /// `(N, width)`.
    rows: Floats,
    width: usize,
}

impl ExportTable {
    fn open(arguments: &ExportArguments) -> Result<Self> {
        let embeddings = Embeddings::open(&arguments.embeddings)?;
        let mut names = Names::open(&arguments.names)?;
        names.data_set.require(&embeddings.data_set, "give the names of the embedded images")?;
        let clusters = arguments.pseudo_labels.as_deref().map(PseudoLabels::open).transpose()?;
        if let Some(labels) = &clusters {
            labels.data_set.require(&embeddings.data_set, "cluster these embeddings again")?;
            ensure!(
                labels.index == embeddings.index,
                "`{}` and `{}` are about different pictures of one data set; cluster these embeddings \
                 again",
                arguments.embeddings.display(),
                labels.data_set.path.display()
            );
        }
        let (rows, width) = embeddings.rows(arguments.space);
        let name = |&row: &u32| std::mem::take(&mut names.names[row as usize]);
        Ok(Self {
            names: embeddings.index.iter().map(name).collect(),
            clusters: clusters.map(|labels| labels.assignment),
            rows: rows.clone(),
            width,
        })
    }

    fn write_npy(&self, out: &Path) -> Result<Vec<PathBuf>> {
        let count = self.names.len();
        let mut written = vec![out.join("embeddings.npy"), out.join("names.json")];
        let values = self.rows.iter().map(|value| value.to_le_bytes());
        write_array(&written[0], "<f4", &[count, self.width], values)?;
        stage::files::write(&written[1], &serde_json::to_vec(&self.names)?)?;
        let path = out.join("clusters.npy");
        match &self.clusters {
            Some(clusters) => {
                let clusters = clusters.iter().map(|cluster| cluster.to_le_bytes());
                write_array(&path, "<u4", &[count], clusters)?;
                written.push(path);
            }
            // An earlier export's would be taken for those of these embeddings.
            None => stage::files::remove_if_there(&path)?,
        }
        Ok(written)
    }

    fn write_parquet(&self, out: &Path) -> Result<Vec<PathBuf>> {
        let path = out.join("embeddings.parquet");
        let schema = Arc::new(parse_message_type(SCHEMA)?);
        // Few embeddings are equal: a dictionary would only cost time.
        let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
        stage::files::replace(&path, |file| {
            let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties))?;
            for start in (0..self.names.len()).step_by(ROWS_AT_ONCE) {
                let rows = start..(start + ROWS_AT_ONCE).min(self.names.len());
                let mut group = writer.next_row_group()?;
                self.write_group(&mut group, rows)?;
                group.close()?;
            }
            writer.close()?;
            Ok(())
        })?;
        Ok(vec![path])
    }

    /// Writes the columns of some rows.
    fn write_group<W: Write + Send>(
        &self,
        group: &mut SerializedRowGroupWriter<W>,
        rows: Range<usize>,
    ) -> Result<()> {
        let names: Vec<ByteArray> =
            self.names[rows.clone()].iter().map(|name| name.as_str().into()).collect();
        write_column::<ByteArrayType>(group, &names, None, None)?;
        let clusters = self.clusters.iter().flat_map(|clusters| &clusters[rows.clone()]);
        let clusters = clusters.map(|&cluster| i32::try_from(cluster));
        let clusters = clusters.collect::<Result<Vec<i32>, _>>()?;
        let is_given = vec![i16::from(self.clusters.is_some()); rows.len()];
        write_column::<Int32Type>(group, &clusters, Some(&is_given), None)?;
        let values = &self.rows[rows.start * self.width..rows.end * self.width];
        // A list begins where the repetition level is 0, and every element is there: level 1.
        let begins: Vec<i16> = (0..values.len()).map(|i| i16::from(i % self.width > 0)).collect();
        let is_there = vec![1; values.len()];
        write_column::<FloatType>(group, values, Some(&is_there), Some(&begins))
    }
}

/// The columns of `embeddings.parquet`.
const SCHEMA: &str = "message embeddings {
    required binary name (UTF8);
    optional int32 cluster;
    required group embedding (LIST) { repeated group list { required float element; } }
}";

/// Rows of one row group of `embeddings.parquet`.
const ROWS_AT_ONCE: usize = 10_000;

/// Writes the next column of a row group.
fn write_column<T: DataType>(
    group: &mut SerializedRowGroupWriter<impl Write + Send>,
    values: &[T::T],
    definitions: Option<&[i16]>,
    repetitions: Option<&[i16]>,
) -> Result<()> {
    let mut column = group.next_column()?.context("the schema has no further column")?;
    column.typed::<T>().write_batch(values, definitions, repetitions)?;
    Ok(column.close()?)
}

/// The pictures of all clusters as a list of objects in JSON, by cluster, and there by falling score: `name`;
/// `cluster`, its number, and `cluster-name`, null for marked pictures; `mark`, `wrong`, `outlier` or null;
/// `confidence` and `score`; `reliable`, whether the experiment would train on the picture's cluster.
///
/// # Errors
///
/// None in practice.
pub fn clusters_as_json(clusters: &[Cluster], names: &Names) -> Result<Vec<u8>> {
    let object = |(cluster, member): (&Cluster, &ClusterMember)| {
        json!({
            "name": names.names[member.row as usize],
            "cluster": cluster.mark.is_none().then_some(cluster.number),
            "cluster-name": cluster.name,
            "mark": cluster.mark.map(PictureMark::word),
            "confidence": member.confidence,
            "score": member.score,
            "reliable": member.reliable,
        })
    };
    Ok(serde_json::to_vec(&members(clusters).map(object).collect::<Vec<_>>())?)
}

/// The same in Parquet, with the columns of these names.
///
/// # Errors
///
/// A number of a cluster exceeds an i32.
pub fn clusters_as_parquet(clusters: &[Cluster], names: &Names) -> Result<Vec<u8>> {
    let all: Vec<_> = members(clusters).collect();
    let mut bytes = Vec::new();
    let schema = Arc::new(parse_message_type(CLUSTERS_SCHEMA)?);
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default())?;
    let mut group = writer.next_row_group()?;
    let text = |text: &str| ByteArray::from(text);
    let name: Vec<ByteArray> =
        all.iter().map(|(_, member)| text(&names.names[member.row as usize])).collect();
    write_column::<ByteArrayType>(&mut group, &name, None, None)?;
    let number = all.iter().map(|(own, _)| own.mark.is_none().then_some(own.number));
    let number: Vec<Option<i32>> =
        number.map(|number| number.map(i32::try_from).transpose()).collect::<Result<_, _>>()?;
    write_optional::<Int32Type>(&mut group, number)?;
    let name = all.iter().map(|(own, _)| own.name.as_deref().map(text));
    write_optional::<ByteArrayType>(&mut group, name.collect())?;
    let mark = all.iter().map(|(own, _)| own.mark.map(|mark| text(mark.word())));
    write_optional::<ByteArrayType>(&mut group, mark.collect())?;
    let confidence: Vec<f32> = all.iter().map(|(_, member)| member.confidence).collect();
    write_column::<FloatType>(&mut group, &confidence, None, None)?;
    let score: Vec<f32> = all.iter().map(|(_, member)| member.score).collect();
    write_column::<FloatType>(&mut group, &score, None, None)?;
    let reliable: Vec<bool> = all.iter().map(|(_, member)| member.reliable).collect();
    write_column::<BoolType>(&mut group, &reliable, None, None)?;
    group.close()?;
    writer.close()?;
    Ok(bytes)
}

const CLUSTERS_SCHEMA: &str = "message clusters {
    required binary name (UTF8);
    optional int32 cluster;
    optional binary cluster-name (UTF8);
    optional binary mark (UTF8);
    required float confidence;
    required float score;
    required boolean reliable;
}";

fn members(clusters: &[Cluster]) -> impl Iterator<Item = (&Cluster, &ClusterMember)> {
    clusters.iter().flat_map(|own| own.members.iter().map(move |member| (own, member)))
}

fn write_optional<T: DataType>(
    group: &mut SerializedRowGroupWriter<impl Write + Send>,
    values: Vec<Option<T::T>>,
) -> Result<()> {
    let is_there: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
    let values: Vec<T::T> = values.into_iter().flatten().collect();
    write_column::<T>(group, &values, Some(&is_there), None)
}

/// Writes an array in version 1.0 of NumPy's format: a magic number, the length of the header, the header
/// as a Python dictionary padded so that 64 divides where the values start, the values by row.
///
/// - `kind`: NumPy's name of the type, with the order of its bytes.
fn write_array(
    path: &Path,
    kind: &str,
    shape: &[usize],
    values: impl Iterator<Item = [u8; 4]>,
) -> Result<()> {
    let shape: String = shape.iter().map(|extent| format!("{extent},")).collect();
    let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape}), }}");
    let length = (MAGIC.len() + 2 + header.len() + 1).next_multiple_of(64) - MAGIC.len() - 2;
    stage::files::replace(path, |file| {
        let mut file = BufWriter::new(file);
        file.write_all(MAGIC)?;
        file.write_all(&u16::try_from(length)?.to_le_bytes())?;
        writeln!(file, "{header:width$}", width = length - 1)?;
        for value in values {
            file.write_all(&value)?;
        }
        Ok(file.flush()?)
    })
}

/// How a file in NumPy's format begins, with its version.
const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";

#[cfg(test)]
mod tests {
    use std::fs::File;

    use candle_core::Tensor;
    use data::DataSet;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::RowAccessor;

    use super::*;

    /// Three of four pictures, in a width that is not their number.
    fn inputs(folder: &Path) -> Result<ExportArguments> {
        let data_set = DataSet { path: "memory".into(), images: 4, fingerprint: "f".repeat(64) };
        let arguments = ExportArguments {
            embeddings: folder.join("embeddings.safetensors"),
            names: folder.join("names.safetensors"),
            pseudo_labels: Some(folder.join(PseudoLabels::FILE)),
            format: ExportFormat::Npy,
            space: Space::Backbone,
            out: folder.join("export"),
        };
        Embeddings {
            data_set: data_set.clone(),
            index: vec![0, 1, 3],
            width: 2,
            projection_width: 1,
            views: 0,
            backbone: vec![1., -2.5, 3., 4., 0.1, 6.].into(),
            projection: vec![1., -1., 1.].into(),
            backbone_views: vec![].into(),
        }
        .write(&arguments.embeddings)?;
        let names = ["a.png", "b, \"quoted\"\n.png", "not embedded", "ä/=1.png"];
        let names = names.map(str::to_owned).to_vec();
        Names { data_set: data_set.clone(), names }.write(&arguments.names)?;
        PseudoLabels {
            data_set,
            clusters: 2,
            index: vec![0, 1, 3],
            assignment: vec![1, 0, 1],
            kmeans_assignment: vec![0; 3],
            confidence: vec![1.; 3],
            score: vec![1.; 3],
            reliable: vec![true; 3],
            stability: None,
            head_agreement: None,
            projection_width: 1,
            prototypes: vec![0.; 2],
        }
        .write(&folder.join(PseudoLabels::FILE))?;
        Ok(arguments)
    }

    const NAMES: [&str; 3] = ["a.png", "b, \"quoted\"\n.png", "ä/=1.png"];

    #[test]
    fn arrays_are_read_back_with_their_shape_and_type() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = inputs(folder.path())?;
        let written = run(&arguments)?;
        let bytes = fs::read(&written[0])?;
        assert_eq!(bytes.len(), 128 + 6 * 4, "values start where 64 divides");
        assert!(bytes.starts_with(MAGIC) && bytes[127] == b'\n');
        let array = Tensor::read_npy(&written[0])?;
        assert_eq!(array.to_vec2::<f32>()?, [[1., -2.5], [3., 4.], [0.1, 6.]]);
        let names: Vec<String> = serde_json::from_slice(&fs::read(&written[1])?)?;
        assert_eq!(names, NAMES);
        assert_eq!(Tensor::read_npy(&written[2])?.to_vec1::<u32>()?, [1, 0, 1]);

        let projections = ExportArguments { space: Space::Projection, ..arguments };
        let array = Tensor::read_npy(&run(&projections)?[0])?;
        assert_eq!(array.to_vec2::<f32>()?, [[1.], [-1.], [1.]]);

        // Of a run without clusters: no earlier clusters stay beside its embeddings.
        let unclustered = ExportArguments { pseudo_labels: None, ..projections };
        assert_eq!(run(&unclustered)?.len(), 2);
        assert!(!folder.path().join("clusters.npy").exists() && !written[2].exists());
        Ok(())
    }

    /// Name, cluster and embedding.
    type ExportedRow = (String, Option<i32>, Vec<f32>);

    /// The rows of a Parquet file.
    fn rows(path: &Path) -> Result<Vec<ExportedRow>> {
        let reader = SerializedFileReader::new(File::open(path)?)?;
        let row = |row: Result<parquet::record::Row, _>| -> Result<_> {
            let row = row?;
            let list = row.get_list(2)?.elements().iter();
            let number = |field: &parquet::record::Field| match field {
                parquet::record::Field::Float(number) => *number,
                other => panic!("{other} is not a f32"),
            };
            let cluster = row.get_int(1).ok();
            Ok((row.get_string(0)?.clone(), cluster, list.map(number).collect()))
        };
        reader.get_row_iter(None)?.map(row).collect()
    }

    #[test]
    fn a_parquet_file_is_read_back_row_by_row() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = ExportArguments { format: ExportFormat::Parquet, ..inputs(folder.path())? };
        let want = |clusters: [Option<i32>; 3]| -> Vec<ExportedRow> {
            let embeddings = [vec![1., -2.5], vec![3., 4.], vec![0.1, 6.]];
            let names = NAMES.map(str::to_owned).into_iter();
            names.zip(clusters).zip(embeddings).map(|((n, c), e)| (n, c, e)).collect()
        };
        assert_eq!(rows(&run(&arguments)?[0])?, want([Some(1), Some(0), Some(1)]));
        let without = ExportArguments { pseudo_labels: None, ..arguments };
        assert_eq!(rows(&run(&without)?[0])?, want([None; 3]));
        Ok(())
    }

    #[test]
    fn clusters_of_other_pictures_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = inputs(folder.path())?;
        let path = folder.path().join(PseudoLabels::FILE);
        let mut labels = PseudoLabels::open(&path)?;
        labels.index = vec![0, 2, 3];
        labels.write(&path)?;
        let error = run(&arguments).expect_err("other pictures").to_string();
        assert!(error.contains("different pictures") && error.contains("again"), "{error}");
        assert!(!arguments.out.exists());
        Ok(())
    }
}
