//! Device Self-test (Base 5.9, 8.6): reads the namespaces in the background and tells of the first block that cannot be read.
//!
//! An extended test reads every block, a short one samples that are spread over each namespace. There is one segment, number 1: the
//! blocks. A request that fails is made again block by block, so that the log names the block. A short test ends with a reset, an
//! extended one goes on after it ("shall persist across any Controller Level Reset").

use std::collections::VecDeque;
use std::time::Instant;

use block::Operation;
use nvme_spec::log::{self, SelfTestLog, SelfTestResult};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry};

use crate::admin::{Admin, Answer, Job, Pool};
use crate::maintenance::{Chunk, Kind, Next, Sweep};
use crate::namespace;
use crate::worker::Step;

/// CDW10 bits 3:0, Self-test Code.
pub(crate) const SHORT: u8 = 1;
pub(crate) const EXTENDED: u8 = 2;
const ABORT: u8 = 0xf;
/// The segment that reads.
const SEGMENT: u8 = 1;
/// Bytes of one request.
const CHUNK_BYTES: u64 = 1 << 20;
/// Requests that a short test makes in a namespace.
const SAMPLES: u64 = 16;
/// Results that the log has room for.
pub(crate) const RESULTS: usize = 20;

/// A test that is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Testing {
    pub code: u8,
    pub sweep: Sweep,
    /// A request failed: up to here, blocks are read one by one.
    pub probe_until_bytes: Option<u64>,
}

/// Self-tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SelfTest {
    pub running: Option<Testing>,
    /// Newest first.
    pub results: VecDeque<SelfTestResult>,
}

impl Admin {
    /// Device Self-test: completes when the test has begun, or has been aborted.
    pub fn device_self_test(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let code = (entry.cdw10 & 0xf) as u8;
        match code {
            ABORT => {
                self.end_self_test(log::SELF_TEST_ABORTED, None);
                return Ok(Answer::Now(0));
            }
            SHORT | EXTENDED => {}
            _ => return Err(Status::INVALID_FIELD.do_not_retry()),
        }
        // Without a namespace there is nothing to read: the test is of the controller alone.
        if !matches!(entry.nsid, 0 | NSID_BROADCAST) {
            namespace::ready(&self.namespaces, entry.nsid)?;
            pool.shared.gate.check_access(entry.nsid)?;
        }
        if self.self_test.running.is_some() {
            return Err(Status::SELF_TEST_IN_PROGRESS.do_not_retry());
        }
        let sweep = Sweep::new(entry.nsid);
        self.self_test.running = Some(Testing { code, sweep, probe_until_bytes: None });
        Ok(Answer::Now(0))
    }

    pub(crate) fn next_of_self_test(&self) -> Next {
        let Some(running) = &self.self_test.running else { return Next::Nothing };
        let stride = |size_bytes: u128| match running.code {
            EXTENDED => CHUNK_BYTES,
            _ => (size_bytes.div_ceil(SAMPLES.into()) as u64).next_multiple_of(CHUNK_BYTES),
        };
        let Some(mut chunk) = running.sweep.next(&self.namespaces, CHUNK_BYTES, stride) else {
            return Next::End;
        };
        if let Some(until_bytes) = running.probe_until_bytes
            && let Ok(namespace) = namespace::find(&self.namespaces, chunk.nsid)
        {
            let block_bytes = 1 << namespace.block_shift;
            chunk.length_bytes = block_bytes;
            chunk.next_bytes = chunk.offset_bytes + block_bytes;
            chunk.is_last = chunk.is_last && chunk.next_bytes >= until_bytes;
        }
        let step = Step {
            nsid: chunk.nsid,
            operation: Operation::Verify,
            offset_bytes: chunk.offset_bytes,
            length_bytes: chunk.length_bytes,
        };
        Next::Request { chunk, steps: vec![step], write: false }
    }

    /// A request has ended.
    pub(crate) fn advance_self_test(&mut self, chunk: &Chunk, status: Status) {
        let Some(running) = &mut self.self_test.running else { return };
        let marked = namespace::find(&self.namespaces, chunk.nsid)
            .is_ok_and(|namespace| namespace.is_uncorrectable(chunk.offset_bytes, chunk.length_bytes));
        // What the image gives for blocks that Write Uncorrectable has marked does not count.
        let status = if marked { Status::UNRECOVERED_READ_ERROR } else { status };
        if status.is_success() {
            running.sweep.advance(chunk);
            if running.probe_until_bytes.is_some_and(|until_bytes| chunk.next_bytes >= until_bytes) {
                running.probe_until_bytes = None;
            }
            return;
        }
        if running.probe_until_bytes.is_none() {
            running.sweep.nsid = chunk.nsid;
            running.sweep.offset_bytes = chunk.offset_bytes;
            running.probe_until_bytes = Some(chunk.offset_bytes + chunk.length_bytes);
            return;
        }
        let block =
            namespace::find(&self.namespaces, chunk.nsid).map_or(0, |ns| ns.block_at(chunk.offset_bytes));
        self.end_self_test(log::SELF_TEST_FAILED_SEGMENT, Some((chunk.nsid, block, status)));
    }

    /// Namespace `nsid` is another one now, or none: what was read of the one before says nothing of it.
    pub(crate) fn restart_self_test(&mut self, nsid: u32) {
        let Some(running) = self.self_test.running.as_mut().filter(|test| test.sweep.nsid == nsid) else {
            return;
        };
        if running.sweep.scope == nsid {
            return self.end_self_test(log::SELF_TEST_NAMESPACE_REMOVED, None);
        }
        running.sweep.offset_bytes = 0;
        running.probe_until_bytes = None;
        self.forget_self_test_request();
    }

    /// What a test still has in flight is nobody's.
    fn forget_self_test_request(&mut self) {
        let own = |job: &Job| matches!(job, Job::Operation { kind: Kind::SelfTest, .. });
        self.jobs.iter_mut().map(|(_, job)| job).filter(|job| own(job)).for_each(|job| *job = Job::Nothing);
    }

    /// Nothing is left to read.
    pub(crate) fn complete_self_test(&mut self) {
        let Some(running) = &self.self_test.running else { return };
        let scope = running.sweep.scope;
        let removed =
            !matches!(scope, 0 | NSID_BROADCAST) && namespace::find(&self.namespaces, scope).is_err();
        self.end_self_test(
            if removed { log::SELF_TEST_NAMESPACE_REMOVED } else { log::SELF_TEST_PASSED },
            None,
        );
    }

    /// Ends the test that is running, if one is, and notes how.
    pub(crate) fn end_self_test(&mut self, result: u8, failure: Option<(u32, u64, Status)>) {
        let Some(running) = self.self_test.running.take() else { return };
        self.forget_self_test_request();
        let now = self.paused_at.unwrap_or_else(Instant::now);
        let mut entry = SelfTestResult {
            status: result | running.code << 4,
            power_on_hours: self.health.power_on_seconds_at(now) / 3600,
            nsid: running.sweep.scope,
            valid: log::SELF_TEST_NSID_VALID,
            ..SelfTestResult::default()
        };
        if let Some((nsid, lba, status)) = failure {
            (entry.segment, entry.nsid, entry.failing_lba) = (SEGMENT, nsid, lba);
            entry.status_code_type = (status.code().0 >> 8) as u8;
            entry.status_code = status.code().0 as u8;
            entry.valid = log::SELF_TEST_ALL_VALID;
        }
        self.self_test.results.truncate(RESULTS - 1);
        self.self_test.results.push_front(entry);
        self.keep();
    }

    /// The Device Self-test log (Base 5.16.1.7).
    pub(crate) fn self_test_log(&self) -> Vec<u8> {
        let unused = SelfTestResult { status: log::SELF_TEST_UNUSED, ..SelfTestResult::default() };
        let mut results = [unused; RESULTS];
        results.iter_mut().zip(&self.self_test.results).for_each(|(place, result)| *place = *result);
        let running = &self.self_test.running;
        SelfTestLog {
            operation: running.map_or(0, |running| running.code),
            completion_percent: running
                .map_or(0, |running| running.sweep.progress(&self.namespaces, 100) as u8),
            results,
        }
        .to_bytes()
        .to_vec()
    }
}
