//! How this process was started: alone, or as one of several ranks.

use std::env;

use crate::{CommunicationError, Communicator, Result};

/// Variables in which `mpirun` and `srun` give each process the number of ranks.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Variables in which they give each process its number among those on its machine.
const LOCAL_RANKS: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", SLURM_LOCAL_RANK];

const SLURM_LOCAL_RANK: &str = "SLURM_LOCALID";

/// Where a launcher has put one of several ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// This rank among those on its machine, from 0.
    pub local_rank: usize,
    /// Whether the launcher shows each rank only its own GPUs, numbered from 0.
    pub has_own_gpus: bool,
}

impl Place {
    /// The place of this process; `None` where `mpirun` or `srun` started no other rank, or a launcher that
    /// does not number the ranks of a machine.
    pub fn of_environment() -> Option<Self> {
        Self::find(|name| env::var(name).ok())
    }

    fn find(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        if launched(&variable) < 2 {
            return None;
        }
        let known = |name: &'static str| Some((name, variable(name)?.parse().ok()?));
        let (name, local_rank) = LOCAL_RANKS.into_iter().find_map(known)?;
        // `srun --gpus-per-task` binds GPUs to tasks. `mpirun` within such a job binds none.
        let is_bound = name == SLURM_LOCAL_RANK && variable("SLURM_GPUS_PER_TASK").is_some();
        Some(Self { local_rank, has_own_gpus: is_bound })
    }
}

impl Communicator {
    /// The ranks that `mpirun` or `srun` started, or the only one where neither did.
    ///
    /// # Errors
    ///
    /// There are several, and the program is built without the feature `mpi`; or their number is not a
    /// power of two.
    pub fn of_environment() -> Result<Self> {
        match launched(|name| env::var(name).ok()) {
            0 | 1 => Ok(Self::single()),
            ranks => Self::started(ranks),
        }
    }

    #[cfg(feature = "mpi")]
    fn started(ranks: usize) -> Result<Self> {
        crate::check_size(ranks)?;
        let world = std::sync::Arc::new(crate::mpi::World::new()?);
        let (rank, size) = (world.rank(), world.size());
        if size != ranks {
            return Err(CommunicationError::new(format!(
                "{ranks} ranks were started, but MPI connects {size}; start them with the `mpirun` of the \
                 MPI that this program is built with, or with the `srun --mpi=` that fits it"
            )));
        }
        let second = world.has_background().then(|| crate::Links::MpiInBackground(world.clone()));
        Ok(Self::of(rank, size, crate::Links::Mpi(world), second))
    }

    #[cfg(not(feature = "mpi"))]
    fn started(ranks: usize) -> Result<Self> {
        Err(CommunicationError::new(format!(
            "{ranks} ranks were started, but this program is built without MPI; install Open MPI or MPICH \
             and libclang, and build it with `--features mpi`"
        )))
    }
}

/// The number of ranks by a launcher's variables; 1 without one.
fn launched(variable: impl Fn(&str) -> Option<String>) -> usize {
    // `srun` sets its own for programs that do not use MPI, too; those that do have `PMI_RANK` or
    // `PMIX_RANK`.
    let by_mpi = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"];
    if by_mpi.iter().all(|name| variable(name).is_none()) {
        return 1;
    }
    SIZES.iter().find_map(|name| variable(name)?.parse().ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_ranks_is_read_from_the_launchers_variables() {
        let of = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
            launched(|name| find(name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(of(&[]), 1);
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")]), 4);
        assert_eq!(of(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), 2);
        assert_eq!(of(&[("PMIX_RANK", "3"), ("SLURM_STEP_NUM_TASKS", "8")]), 8);
        // A job of Slurm's whose step uses no MPI.
        assert_eq!(of(&[("SLURM_STEP_NUM_TASKS", "8")]), 1);
    }

    #[test]
    fn the_number_of_a_rank_on_its_machine_is_read_from_the_launchers_variables() {
        let of = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
            Place::find(|name| find(name).map(|(_, value)| (*value).to_owned()))
        };
        let place = |local_rank, has_own_gpus| Some(Place { local_rank, has_own_gpus });
        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            // Of the job that `mpirun` was started in.
            ("SLURM_LOCALID", "0"),
        ];
        assert_eq!(of(&open_mpi), place(1, false));
        let within_slurm = [&open_mpi[..], &[("SLURM_GPUS_PER_TASK", "1")]].concat();
        assert_eq!(of(&within_slurm), place(1, false));
        let slurm = [("PMIX_RANK", "5"), ("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_LOCALID", "3")];
        assert_eq!(of(&slurm), place(3, false));
        assert_eq!(of(&[&slurm[..], &[("SLURM_GPUS_PER_TASK", "1")]].concat()), place(3, true));
        let mpich = [("PMI_RANK", "5"), ("PMI_SIZE", "8"), ("MPI_LOCALRANKID", "2")];
        assert_eq!(of(&mpich), place(2, false));
        // A step that uses no MPI, and a single rank.
        assert_eq!(of(&slurm[1..]), None);
        assert_eq!(of(&[&open_mpi[..1], &open_mpi[2..]].concat()), None);
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn ranks_of_a_program_without_mpi_are_refused_with_the_remedy() {
        let error = Communicator::started(4).expect_err("not built in").to_string();
        assert!(error.contains("4 ranks") && error.contains("--features mpi"), "{error}");
    }
}
