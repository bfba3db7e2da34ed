//! Certificates for tests, made when they are needed: a folder as `--tls-dir` takes it is filled by an [`Authority`].
//!
//! Helpers panic: in a test that is the way to say that something is wrong.
//!
//! Absent: certificates that expire soon, and so tests that fail one day.
#![forbid(unsafe_code)]
#![allow(clippy::missing_panics_doc, reason = "helpers of tests panic instead of returning errors")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Whether a certificate can still be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// From long ago until a time that nobody sees.
    Valid,
    /// It was valid once.
    Expired,
}

/// Someone who signs certificates.
#[derive(Debug)]
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// An authority of this name, with a key of its own.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = parameters.self_signed(&key).expect("it signs for itself").pem();
        Self { certificate, issuer: Issuer::new(parameters, key) }
    }

    /// Makes the folder `path` with ca.pem of this authority, and cert.pem and key.pem of a process that others may reach under
    /// `names` (host names or addresses).
    pub fn fill(&self, path: &Path, names: &[&str], validity: Validity) {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut parameters = CertificateParams::new(names).expect("these are names");
        parameters.distinguished_name.push(DnType::CommonName, "a process");
        if validity == Validity::Expired {
            parameters.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = parameters.signed_by(&key, &self.issuer).expect("it signs").pem();
        fs::create_dir_all(path).expect("the folder can be made");
        for (name, mode, text) in [
            ("ca.pem", 0o644, &self.certificate),
            ("cert.pem", 0o644, &certificate),
            ("key.pem", 0o600, &key.serialize_pem()),
        ] {
            let path = path.join(name);
            fs::write(&path, text).expect("a file can be written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
        }
    }
}
