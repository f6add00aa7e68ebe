//! Advice for a device that runs out of memory.

use anyhow::Error;
use serde::Serialize;
use serde_json::Value;

/// Errors of a full device: CUDA, cuDNN 8 and 9, cuBLAS, cuRAND, Metal.
const FULL: [&str; 6] = [
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CURAND_STATUS_ALLOCATION_FAILED",
    "Failed to create metal resource: Buffer",
];

/// Adds a smaller batch size to try to the error of a full device.
///
/// - `table`: the table `[name]` of the stage.
pub(crate) fn advise(error: Error, name: &str, table: &impl Serialize) -> Error {
    let text = format!("{error:#}");
    if !FULL.iter().any(|words| text.contains(words)) {
        return error;
    }
    let size = |table: &Value| table.get("batch-size").and_then(Value::as_u64);
    let found = serde_json::to_value(table).ok().and_then(|table| {
        let of_run = table.get("run").and_then(size).map(|size| (format!("{name}.run"), size));
        of_run.or_else(|| size(&table).map(|size| (name.to_owned(), size)))
    });
    let advice = match found {
        Some((table, size @ 2..)) => format!(
            "the device ran out of memory with {table}.batch-size = {size}; try \
             --set {table}.batch-size={}, or close what else uses the device",
            size / 2
        ),
        _ => "the device ran out of memory; close what else uses it".to_owned(),
    };
    error.context(advice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_full_device_names_the_batch_size_to_try() {
        let full = || anyhow::anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        let said = |size: u64| {
            format!(
                "{:#}",
                advise(full(), "pretraining", &json!({ "run": { "batch-size": size } }))
            )
        };
        assert!(said(256).contains("batch-size = 256; try --set pretraining.run.batch-size=128,"));
        assert!(said(3).contains("batch-size=1,"), "{}", said(3));
        assert!(said(256).contains("CUDA_ERROR_OUT_OF_MEMORY"), "the cause is still there");
        assert!(!said(1).contains("batch-size"), "nothing is below 1");
        assert!(format!("{:#}", advise(full(), "metrics", &json!({}))).contains("close"));
        for words in FULL {
            let error = anyhow::anyhow!("{words}").context("a step");
            let said = format!("{:#}", advise(error, "a", &json!({ "batch-size": 8 })));
            assert!(said.contains("try --set a.batch-size=4"), "{said}");
        }
        let other = anyhow::anyhow!("no such file");
        assert_eq!(
            format!("{:#}", advise(other, "a", &json!({ "batch-size": 8 }))),
            "no such file"
        );
    }
}
