//! Mutual authentication: pinned keys, or a certificate authority.
//!
//! The verifiers here decide *whom* to trust. That the peer holds the key of its certificate is verified by the crypto
//! provider, as in any TLS 1.3 handshake. Each handshake gets verifiers of its own, so that a refused key can be reported.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _,
    },
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use super::{Error, lock};
use crate::{
    identity::{Fingerprint, Identity},
    peers::Peers,
    proto::ALPN,
};

/// TLS alert that says "your certificate is fine, but you may not".
const ALERT_ACCESS_DENIED: u64 = 49;

/// QUIC error codes that carry TLS alerts start here (RFC 9001, section 4.8).
const CRYPTO_ERROR: u64 = 0x100;

/// Whom this host trusts besides itself.
#[derive(Clone, Debug)]
pub enum Trust {
    /// The hosts in this list.
    List(Peers),
    /// The hosts in this file. It is read at every handshake, so a change counts at once.
    File(PathBuf),
}

impl Trust {
    fn find(&self, fingerprint: Fingerprint) -> Result<Option<String>, Error> {
        let name = |peers: &Peers| peers.find(fingerprint).map(|peer| peer.name.clone());
        match self {
            Trust::List(peers) => Ok(name(peers)),
            Trust::File(path) => {
                let unusable = |error: crate::peers::PeersError| Error::Credentials {
                    what: "list of peers",
                    path: path.clone(),
                    why: error.to_string(),
                };
                Ok(name(&Peers::load(path).map_err(unusable)?))
            }
        }
    }
}

/// Files for authentication through a certificate authority (CRIU's `--tls-*` options).
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificates of the authorities that peers must be signed by, PEM.
    pub cacert: PathBuf,
    /// Revoked certificates, PEM.
    pub cacrl: Option<PathBuf>,
    /// Certificate of this host and what is between it and the authority, PEM.
    pub cert: PathBuf,
    /// Private key of this host, PEM.
    pub key: PathBuf,
    /// Whether the name that was dialled must be in the server's certificate (off: CRIU's `--tls-no-cn-verify`).
    pub verify_name: bool,
}

/// How this host proves who it is, and whom it trusts.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// Keys of hosts are known by their fingerprints. A host trusts itself.
    Pinned {
        /// This host.
        identity: Identity,
        /// The others.
        trust: Trust,
    },
    /// Whoever has a certificate of the authority is trusted.
    Authority(TlsFiles),
}

/// The crypto provider: aws-lc-rs, with the fastest cipher first.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        use aws_lc_rs::cipher_suite::{
            TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
        };
        let cipher_suites = vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ];
        Arc::new(CryptoProvider {
            cipher_suites,
            ..aws_lc_rs::default_provider()
        })
    };
    PROVIDER.get_or_init(make).clone()
}

/// Credentials that were read and checked once, ready for handshakes.
#[derive(Debug)]
pub(super) struct Authenticator {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
    policy: Policy,
}

#[derive(Debug)]
enum Policy {
    Pinned(Trust),
    Authority {
        client: Arc<WebPkiServerVerifier>,
        server: Arc<dyn ClientCertVerifier>,
        verify_name: bool,
    },
}

/// What a verifier found out, for the one handshake it was made for.
pub(super) type Outcome = Arc<Mutex<Option<Refused>>>;

/// Why a handshake was refused on this side.
#[derive(Clone, Debug)]
pub(super) enum Refused {
    Unknown(Fingerprint),
    Unusable(Error),
}

impl Authenticator {
    pub(super) fn new(credentials: &Credentials) -> Result<Self, Error> {
        match credentials {
            Credentials::Pinned { identity, trust } => Ok(Self {
                chain: vec![identity.certificate.clone()],
                key: identity.key.clone_key(),
                fingerprint: identity.fingerprint(),
                policy: Policy::Pinned(trust.clone()),
            }),
            Credentials::Authority(files) => Self::from_files(files),
        }
    }

    fn from_files(files: &TlsFiles) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in read_certificates("certificate of the authority", &files.cacert)? {
            let why = |error: rustls::Error| unusable("certificate of the authority", &files.cacert, error);
            roots.add(certificate).map_err(why)?;
        }
        let roots = Arc::new(roots);
        let crls = match &files.cacrl {
            None => vec![],
            Some(path) => CertificateRevocationListDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| unusable("list of revoked certificates", path, error))?,
        };
        let builder = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider());
        let client = builder.with_crls(crls.clone()).build();
        let client = client.map_err(|error| unusable("certificate of the authority", &files.cacert, error))?;
        let builder = WebPkiClientVerifier::builder_with_provider(roots, provider());
        let server = builder.with_crls(crls).build();
        let server = server.map_err(|error| unusable("certificate of the authority", &files.cacert, error))?;
        let chain = read_certificates("certificate", &files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key);
        let key = key.map_err(|error| unusable("private key", &files.key, error))?;
        let fingerprint = Fingerprint::of_certificate(&chain[0]);
        let fingerprint = fingerprint.map_err(|error| unusable("certificate", &files.cert, error))?;
        let policy = Policy::Authority {
            client,
            server,
            verify_name: files.verify_name,
        };
        Ok(Self {
            chain,
            key,
            fingerprint,
            policy,
        })
    }

    /// TLS for one connection that is dialled.
    pub(super) fn client(self: &Arc<Self>, outcome: &Outcome) -> Result<QuicClientConfig, Error> {
        let verifier = Arc::new(Verifier {
            authenticator: self.clone(),
            outcome: outcome.clone(),
        });
        let builder = rustls::ClientConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let mut config = builder.with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed TLS session would skip the certificates, and with them the list of peers.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(QuicClientConfig::try_from(config).expect("AES-128-GCM is among the ciphers"))
    }

    /// TLS for one connection that is accepted.
    pub(super) fn server(self: &Arc<Self>, outcome: &Outcome) -> Result<QuicServerConfig, Error> {
        let verifier = Arc::new(Verifier {
            authenticator: self.clone(),
            outcome: outcome.clone(),
        });
        let builder = rustls::ServerConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = builder.with_client_cert_verifier(verifier);
        let mut config = builder.with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(QuicServerConfig::try_from(config).expect("AES-128-GCM is among the ciphers"))
    }

    /// Who is at the other end of a connection whose handshake is done, and what the list calls it.
    pub(super) fn peer(&self, connection: &quinn::Connection) -> Result<(Fingerprint, Option<String>), Error> {
        let identity = connection
            .peer_identity()
            .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let certificate = identity.and_then(|chain| chain.first().cloned());
        let certificate = certificate.ok_or(rustls::Error::NoCertificatesPresented)?;
        let fingerprint = Fingerprint::of_certificate(&certificate)?;
        let name = match &self.policy {
            Policy::Pinned(trust) => trust.find(fingerprint)?,
            Policy::Authority { .. } => None,
        };
        Ok((fingerprint, name))
    }

    /// Makes sense of a connection that failed.
    pub(super) fn explain(&self, address: SocketAddr, outcome: &Outcome, source: quinn::ConnectionError) -> Error {
        match lock(outcome).take() {
            Some(Refused::Unknown(fingerprint)) => return Error::UnknownPeer { address, fingerprint },
            Some(Refused::Unusable(error)) => return error,
            None => {}
        }
        match source {
            quinn::ConnectionError::ConnectionClosed(close)
                if u64::from(close.error_code) == CRYPTO_ERROR + ALERT_ACCESS_DENIED =>
            {
                Error::RefusedByPeer {
                    address,
                    fingerprint: self.fingerprint,
                }
            }
            source => Error::Connection { address, source },
        }
    }

    fn check_pinned(&self, trust: &Trust, end: &CertificateDer<'_>, outcome: &Outcome) -> Result<(), rustls::Error> {
        let fingerprint = Fingerprint::of_certificate(end)?;
        if fingerprint == self.fingerprint {
            return Ok(());
        }
        let refused = match trust.find(fingerprint) {
            Ok(Some(_)) => return Ok(()),
            Ok(None) => Refused::Unknown(fingerprint),
            Err(error) => Refused::Unusable(error),
        };
        *lock(outcome) = Some(refused);
        Err(CertificateError::ApplicationVerificationFailure.into())
    }
}

#[derive(Debug)]
struct Verifier {
    authenticator: Arc<Authenticator>,
    outcome: Outcome,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.authenticator.policy {
            Policy::Pinned(trust) => {
                self.authenticator.check_pinned(trust, end, &self.outcome)?;
                Ok(ServerCertVerified::assertion())
            }
            Policy::Authority {
                client, verify_name, ..
            } => {
                match client.verify_server_cert(end, intermediates, name, ocsp, now) {
                    // The name is checked last, after the chain.
                    Err(rustls::Error::InvalidCertificate(
                        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                    )) if !verify_name => Ok(ServerCertVerified::assertion()),
                    result => result,
                }
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        match &self.authenticator.policy {
            Policy::Pinned(_) => &[],
            Policy::Authority { server, .. } => server.root_hint_subjects(),
        }
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match &self.authenticator.policy {
            Policy::Pinned(trust) => {
                self.authenticator.check_pinned(trust, end, &self.outcome)?;
                Ok(ClientCertVerified::assertion())
            }
            Policy::Authority { server, .. } => server.verify_client_cert(end, intermediates, now),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

fn read_certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = certificates.map_err(|error| unusable(what, path, error))?;
    if certificates.is_empty() {
        Err(unusable(what, path, "it holds no certificate"))
    } else {
        Ok(certificates)
    }
}

fn unusable(what: &'static str, path: &Path, why: impl ToString) -> Error {
    Error::Credentials {
        what,
        path: path.to_owned(),
        why: why.to_string(),
    }
}
