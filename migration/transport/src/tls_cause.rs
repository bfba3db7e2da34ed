//! Why two ends do not trust each other, in plain words.
//!
//! Who finds something says what; the other is told by an alert (RFC 8446, section 6), which has fewer words for it. The
//! sentences of both are beside each other here, so that they name the same cause.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

/// The first bytes of a peer that speaks our protocol without TLS.
const PLAIN: &[u8] = b"FRRY";

/// What is wrong with a peer whose first bytes are no TLS.
pub(crate) fn of_first_bytes(bytes: &[u8]) -> Option<&'static str> {
    let length = bytes.len().min(PLAIN.len());
    let same = length > 0 && bytes.get(..length) == PLAIN.get(..length);
    same.then_some("it speaks plain text: it was given no --tls-dir")
}

/// What is wrong, as this end found it or was told.
pub(crate) fn of(error: &Error) -> String {
    match error {
        Error::AlertReceived(alert) => told(*alert),
        Error::InvalidCertificate(error) => found(error),
        Error::NoCertificatesPresented => "it has no certificate".to_owned(),
        Error::PeerIncompatible(
            PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic,
        ) => VERSION.to_owned(),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => "it does not speak TLS".to_owned(),
        Error::DecryptError => "what came was changed on its way".to_owned(),
        error => error.to_string(),
    }
}

const VERSION: &str = "it does not speak TLS 1.3";

fn found(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet".to_owned()
        }
        CertificateError::UnknownIssuer => {
            "its certificate was not signed by an authority of our ca.pem".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names = if presented.is_empty() { "no name".to_owned() } else { presented.join(", ") };
            format!("its certificate is not valid for {:?}, but for {names}", expected.to_str())
        }
        error => format!("its certificate cannot be accepted: {error}"),
    }
}

fn told(alert: AlertDescription) -> String {
    let refused = |why: &str| format!("it refused our certificate, {why}");
    match alert {
        AlertDescription::CertificateExpired => refused("which has expired or is not valid yet"),
        AlertDescription::UnknownCA => refused("which was not signed by an authority of its ca.pem"),
        AlertDescription::BadCertificate => {
            refused("which is broken or not valid for the name we have for it")
        }
        AlertDescription::CertificateRequired => "it wants a certificate of ours".to_owned(),
        AlertDescription::UnsupportedCertificate => refused("which is not for this use"),
        AlertDescription::CertificateRevoked => refused("which was revoked"),
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => refused("without a reason"),
        AlertDescription::DecryptError => refused("whose signature is wrong"),
        AlertDescription::ProtocolVersion => VERSION.to_owned(),
        alert => format!("it ended the link with the alert {alert:?}"),
    }
}
