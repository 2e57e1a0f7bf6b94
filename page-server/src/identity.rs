//! Who a host is: a key pair, a self-signed certificate around it, and the fingerprint that others know it by.

use std::{
    fmt, fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::ParsedCertificate,
};
use sha2::{Digest as _, Sha256};

/// Name of the private key's file in the identity directory.
pub const KEY_FILE: &str = "identity.key";

/// Name of the certificate's file in the identity directory.
pub const CERTIFICATE_FILE: &str = "identity.crt";

const PREFIX: &str = "whb1-";
const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// SHA-256 of a public key (its SubjectPublicKeyInfo). Printed as `whb1-` and 52 characters of base32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Fingerprint of the key in a certificate.
    ///
    /// # Errors
    /// When the certificate does not parse.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        Ok(Self(Sha256::digest(parsed.subject_public_key_info()).into()))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        for group in 0..52 {
            let bits = (group * 5..group * 5 + 5).map(|bit| {
                let byte = self.0.get(bit / 8).copied().unwrap_or(0);
                usize::from(byte >> (7 - bit % 8) & 1)
            });
            let index = bits.fold(0, |value, bit| value << 1 | bit);
            write!(f, "{}", char::from(BASE32[index]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not a fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a fingerprint: it must be {PREFIX} and 52 characters of a-z and 2-7, as `whimbrel id` prints it")]
pub struct ParseFingerprintError;

impl FromStr for Fingerprint {
    type Err = ParseFingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix(PREFIX).ok_or(ParseFingerprintError)?.as_bytes();
        if digits.len() != 52 {
            return Err(ParseFingerprintError);
        }
        let mut hash = [0; 32];
        for (group, digit) in digits.iter().enumerate() {
            let value = BASE32
                .iter()
                .position(|known| known == digit)
                .ok_or(ParseFingerprintError)?;
            for bit in (0..5).filter(|bit| value >> (4 - bit) & 1 != 0) {
                let at = group * 5 + bit;
                *hash.get_mut(at / 8).ok_or(ParseFingerprintError)? |= 1 << (7 - at % 8);
            }
        }
        Ok(Self(hash))
    }
}

/// An identity cannot be loaded or made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others can read the private key.
    #[error("private key {} has mode {mode:o}, others can read it; run `chmod 600` on it", path.display())]
    KeyReadable {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file does not hold what it should.
    #[error("{} does not hold a usable {what}; restore it, or remove both identity files to get a new identity", path.display())]
    Damaged {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A key pair or certificate cannot be made.
    #[error("cannot make a key pair and certificate")]
    Generate(#[from] rcgen::Error),
    /// The certificate does not parse.
    #[error("certificate cannot be used")]
    Certificate(#[from] rustls::Error),
}

/// The key pair of this host.
#[derive(Clone)]
pub struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: Arc<PrivateKeyDer<'static>>,
    fingerprint: Fingerprint,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint)
    }
}

impl Identity {
    /// Makes a new identity that is stored nowhere (an ECDSA P-256 key).
    ///
    /// # Errors
    /// When the key pair or the certificate cannot be made.
    pub fn generate() -> Result<Self, IdentityError> {
        let (certificate, key) = generate_pem()?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("just made");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("just made");
        Self::new(certificate, key)
    }

    /// Loads the identity in `directory`, or makes one there. The directory is made with mode 0700 and the key file with
    /// mode 0600. Of several processes that do this at once, all get the same identity.
    ///
    /// # Errors
    /// When the files cannot be read or written, are damaged, or the key can be read by others.
    pub fn load_or_create(directory: &Path) -> Result<Self, IdentityError> {
        let key_path = directory.join(KEY_FILE);
        if !key_path
            .try_exists()
            .map_err(|source| io_error("look for", &key_path, source))?
        {
            create(directory)?;
        }
        Self::load(directory)
    }

    /// Loads the identity in `directory`.
    ///
    /// # Errors
    /// As [`Identity::load_or_create`].
    pub fn load(directory: &Path) -> Result<Self, IdentityError> {
        let (key_path, certificate_path) = (directory.join(KEY_FILE), directory.join(CERTIFICATE_FILE));
        let metadata = fs::metadata(&key_path).map_err(|source| io_error("read", &key_path, source))?;
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::KeyReadable { path: key_path, mode });
        }
        // The key file holds the certificate too: one rename makes both appear.
        let pem = fs::read(&key_path).map_err(|source| io_error("read", &key_path, source))?;
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| IdentityError::Damaged {
            what: "private key",
            path: key_path.clone(),
        })?;
        let certificate = match CertificateDer::from_pem_slice(&pem) {
            Ok(certificate) => certificate,
            Err(_) => CertificateDer::from_pem_file(&certificate_path).map_err(|_| IdentityError::Damaged {
                what: "certificate",
                path: certificate_path,
            })?,
        };
        Self::new(certificate, key)
    }

    /// The fingerprint others know this host by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn new(certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>) -> Result<Self, IdentityError> {
        let fingerprint = Fingerprint::of_certificate(&certificate)?;
        Ok(Self {
            certificate,
            key: Arc::new(key),
            fingerprint,
        })
    }
}

fn generate_pem() -> Result<(String, String), IdentityError> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut parameters = rcgen::CertificateParams::new(vec!["whimbrel".to_owned()])?;
    parameters
        .distinguished_name
        .push(rcgen::DnType::CommonName, "whimbrel");
    // Pinned keys do not expire; a date in the certificate would only break a host whose clock is wrong.
    parameters.not_before = rcgen::date_time_ymd(1970, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(9999, 12, 31);
    let certificate = parameters.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn create(directory: &Path) -> Result<(), IdentityError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(directory)
        .map_err(|source| io_error("create", directory, source))?;
    let (certificate, key) = generate_pem()?;
    let key_path = directory.join(KEY_FILE);
    // A link fails where the name exists: whoever comes first wins, and nobody sees half a file.
    let temporary = directory.join(format!(".{KEY_FILE}.{}", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(key.as_bytes())?;
        file.write_all(certificate.as_bytes())?;
        file.sync_all()?;
        match fs::hard_link(&temporary, &key_path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
            Ok(()) => fs::write(directory.join(CERTIFICATE_FILE), &certificate),
        }
    };
    let result = write().map_err(|source| io_error("create", &key_path, source));
    let _ = fs::remove_file(&temporary);
    result
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> IdentityError {
    IdentityError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_its_key_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let first = Identity::load_or_create(&path).unwrap();
        let again = Identity::load_or_create(&path).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let key = path.join(KEY_FILE);
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::KeyReadable { mode: 0o644, .. })
        ));
    }

    #[test]
    fn a_damaged_key_is_an_error_and_not_a_new_identity() {
        let directory = tempfile::tempdir().unwrap();
        Identity::load_or_create(directory.path()).unwrap();
        fs::write(directory.path().join(KEY_FILE), "nonsense").unwrap();
        assert!(matches!(
            Identity::load_or_create(directory.path()),
            Err(IdentityError::Damaged { .. })
        ));
    }

    #[test]
    fn fingerprints_print_and_parse() {
        let fingerprint = Identity::generate().unwrap().fingerprint();
        let text = fingerprint.to_string();
        assert_eq!(text.len(), 57);
        assert_eq!(text.parse(), Ok(fingerprint));
        for bad in [
            "",
            "whb1-",
            &text[1..],
            &text[..56],
            &format!("{text}a"),
            &text.to_uppercase(),
        ] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(ParseFingerprintError), "{bad}");
        }
    }
}
