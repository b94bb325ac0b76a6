//! Enrolment: an invitation becomes an enrolment.
//!
//! The worker's keys are durable before the first byte leaves, and the coordinator spends a token with the keys that it
//! was spent on, so a retry after a crash on either side gets the same answer. Renewal is the same exchange with the
//! token that is remembered: nothing else of the protocol gives a new certificate.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use certs::{CertificateDer, worker_identity};
use protocol::ids::WorkerName;
use protocol::invitation::{INVITATION_LEN_MAX, Invitation, InvitationError};
use protocol::limits::{RECONNECT_AFTER_MAX, RECONNECT_AFTER_MIN};
use protocol::messages::{EnrolAnswer, EnrolRefusal, EnrolRequest, Role, decode, encode};
use transport::{Alpn, Client, CloseCode, ConnectError, Trust};

use crate::enrolments::{Enrolment, EnrolmentError, Enrolments, Token};
use crate::files::{self, FileError};
use crate::link::{ANSWER_MAX, Call, Greeted, LinkError, greet};
use crate::options::Hooks;
use crate::report::{Line, Report};
use crate::state::Keys;

/// How often the default place is looked at while no invitation is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Why a worker is not enrolled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// The coordinator says no.
    #[error(transparent)]
    Refused(#[from] EnrolRefusal),
    /// The coordinator at the invitation's addresses is another one.
    #[error(
        "the invitation is of another coordinator than the one at {}; ask that one's operator for an invitation \
         (coordinator invite)",
        addresses.join(", ")
    )]
    Foreign {
        /// Where it was looked for.
        addresses: Vec<String>,
        /// What TLS said.
        source: LinkError,
    },
    /// The exchange failed in a way that trying again will not mend.
    #[error("enrolment failed")]
    Link(#[source] LinkError),
    /// What was granted is not a certificate for our key.
    #[error("the coordinator granted a certificate that is not for this worker's key: {0}")]
    WrongCertificate(String),
    /// The invitation in the default place cannot be read.
    #[error("{place}")]
    Invitation {
        /// The file.
        place: String,
        /// What is wrong.
        source: InvitationError,
    },
    /// What is remembered cannot be read or kept.
    #[error(transparent)]
    Store(#[from] EnrolmentError),
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Everything that enrolment needs.
#[derive(Debug)]
pub(crate) struct Enroller {
    pub(crate) client: Client,
    pub(crate) keys: Keys,
    /// The name to ask for.
    pub(crate) name: WorkerName,
    pub(crate) enrolments: Enrolments,
    pub(crate) default_join: PathBuf,
    /// Whether the user gave an invitation, so that the default place is not looked at.
    pub(crate) invited: bool,
    pub(crate) report: Report,
    pub(crate) hooks: Hooks,
}

impl Enroller {
    /// The enrolment to work under, made first if need be.
    ///
    /// The invitation selects it. Without one, the only enrolment is meant, and with none or several the invitation that
    /// a coordinator on this machine leaves; that one also tells where a coordinator that we know listens now.
    pub(crate) async fn settle(&self, join: Option<&Invitation>) -> Result<Enrolment, EnrolError> {
        let enrolment = match join {
            Some(invitation) => self.under(invitation).await?,
            None => self.without_invitation().await?,
        };
        self.renewed(enrolment).await
    }

    /// Brings an enrolment up to date before each connection: where the coordinator listens now, and a certificate that
    /// does not end soon. What cannot be had now may be at the next.
    pub(crate) async fn refresh(&self, enrolment: &mut Enrolment) {
        if !self.invited
            && let Ok(Some(here)) = self.look()
            && enrolment.is_of(&here)
        {
            enrolment.addresses = here.addresses;
        }
        match self.renewed(enrolment.clone()).await {
            Ok(renewed) => *enrolment = renewed,
            Err(error) => tracing::warn!(%error, "the certificate cannot be renewed"),
        }
    }

    async fn under(&self, invitation: &Invitation) -> Result<Enrolment, EnrolError> {
        let Some(mut enrolment) = self.enrolments.of(invitation)? else { return self.enrol(invitation).await };
        if enrolment.addresses != invitation.addresses {
            enrolment.addresses.clone_from(&invitation.addresses);
            self.enrolments.keep(&enrolment)?;
        }
        Ok(enrolment)
    }

    async fn without_invitation(&self) -> Result<Enrolment, EnrolError> {
        let mut known = self.enrolments.all()?;
        let here = self.look()?;
        match (known.len(), here) {
            // A coordinator on this machine that was begun anew is the one that is meant, not its former self.
            (1, Some(here)) if known[0].is_local() || known[0].is_of(&here) => self.under(&here).await,
            (1, _) => Ok(known.remove(0)),
            (_, Some(here)) => self.under(&here).await,
            (enrolments, None) => {
                let join = self.default_join.clone();
                self.report.say(&Line::Waiting { join, enrolments });
                self.under(&self.wait().await?).await
            }
        }
    }

    async fn wait(&self) -> Result<Invitation, EnrolError> {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Some(invitation) = self.look()? {
                return Ok(invitation);
            }
        }
    }

    /// The invitation in the default place, if there is one.
    fn look(&self) -> Result<Option<Invitation>, EnrolError> {
        let Some(text) = files::read(&self.default_join, INVITATION_LEN_MAX as u64)? else { return Ok(None) };
        let place = self.default_join.display().to_string();
        let parsed = String::from_utf8_lossy(&text).parse();
        parsed.map(Some).map_err(|source| EnrolError::Invitation { place, source })
    }

    /// Renews a certificate that ends soon. As long as it is valid, a failure can wait for the next start.
    async fn renewed(&self, enrolment: Enrolment) -> Result<Enrolment, EnrolError> {
        let now = unix_s(SystemTime::now());
        if !enrolment.is_due(now) {
            return Ok(enrolment);
        }
        match self.ask(&enrolment.as_invitation()).await {
            Ok(renewed) => Ok(renewed),
            Err(error) if enrolment.expires_unix_s > now => {
                tracing::warn!(%error, "the certificate cannot be renewed yet");
                Ok(enrolment)
            }
            Err(error) => Err(told(error, &enrolment.addresses)),
        }
    }

    /// Asks until somebody answers.
    async fn enrol(&self, invitation: &Invitation) -> Result<Enrolment, EnrolError> {
        let mut wait = RECONNECT_AFTER_MIN;
        let mut said = false;
        loop {
            match self.ask(invitation).await {
                Ok(enrolment) => {
                    let Enrolment { name, expires_unix_s, .. } = enrolment.clone();
                    self.report.say(&Line::Enrolled { name, expires_unix_s });
                    return Ok(enrolment);
                }
                Err(AskError::Link(error)) if may_pass(&error) => {
                    if !said {
                        let (addresses, error) = (invitation.addresses.clone(), error.to_string());
                        self.report.say(&Line::Unreachable { addresses, error });
                        said = true;
                    }
                }
                Err(error) => return Err(told(error, &invitation.addresses)),
            }
            tokio::time::sleep(jittered(wait)).await;
            wait = (wait * 2).min(RECONNECT_AFTER_MAX);
        }
    }

    /// Asks once, and keeps what was granted.
    async fn ask(&self, invitation: &Invitation) -> Result<Enrolment, AskError> {
        let ed25519 = self.keys.identity.public();
        let request = encode(&EnrolRequest { token: invitation.token, name: self.name.clone(), ed25519 });
        self.hooks.see(|| &request);
        let trust = Trust::Fingerprint(invitation.ca_sha256);
        let credentials =
            self.client.prepare(&trust, None, Alpn::Join).map_err(ConnectError::from).map_err(LinkError::from)?;
        let call = Call {
            addresses: &invitation.addresses,
            credentials: &credentials,
            role: Role::Join,
            coordinator: &invitation.coordinator_x25519,
            payload: &request,
            patience: ANSWER_MAX,
        };
        let Greeted { connection, ca, payload, .. } = greet(&self.client, &self.keys, call).await?;
        connection.close(CloseCode::Done, "");
        self.hooks.see(|| &payload);
        match decode(&payload).map_err(LinkError::from)? {
            EnrolAnswer::Refused(refusal) => Err(AskError::Refused(refusal)),
            EnrolAnswer::Granted { name, certificate, expires_unix_s } => {
                let certificate = CertificateDer::from(certificate);
                check_certificate(&certificate, &ed25519)?;
                let enrolment = Enrolment {
                    addresses: invitation.addresses.clone(),
                    ca,
                    coordinator: invitation.coordinator_x25519,
                    certificate,
                    name,
                    expires_unix_s,
                    token: Token(invitation.token),
                };
                self.enrolments.keep(&enrolment)?;
                Ok(enrolment)
            }
        }
    }
}

/// How asking once went wrong.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Refused(#[from] EnrolRefusal),
    #[error("{0}")]
    WrongCertificate(String),
    #[error(transparent)]
    Store(#[from] EnrolmentError),
}

fn told(error: AskError, addresses: &[String]) -> EnrolError {
    match error {
        AskError::Link(source) if source.is_foreign() => EnrolError::Foreign { addresses: addresses.to_vec(), source },
        AskError::Link(source) => EnrolError::Link(source),
        AskError::Refused(refusal) => EnrolError::Refused(refusal),
        AskError::WrongCertificate(what) => EnrolError::WrongCertificate(what),
        AskError::Store(error) => EnrolError::Store(error),
    }
}

fn check_certificate(certificate: &CertificateDer<'_>, ed25519: &[u8; 32]) -> Result<(), AskError> {
    let identity = worker_identity(certificate).map_err(|e| AskError::WrongCertificate(e.to_string()))?;
    if identity.public == *ed25519 {
        return Ok(());
    }
    Err(AskError::WrongCertificate("its key is another one".to_owned()))
}

/// Whether a coordinator may be there later: nobody answers, or one that is full or going away.
fn may_pass(error: &LinkError) -> bool {
    let refused = [CloseCode::Refused, CloseCode::IdentityRefused, CloseCode::SessionFailed, CloseCode::Misbehaved];
    match error {
        LinkError::Refused(_) | LinkError::Handshake(_) | LinkError::OutOfTurn(_) | LinkError::Unreadable(_) => false,
        LinkError::Key(_) | LinkError::Entropy(_) => false,
        error if error.is_foreign() => false,
        error => error.code().is_none_or(|code| !refused.contains(&code)),
    }
}

/// Between half of `wait` and all of it, so that a fleet does not come back in step.
pub(crate) fn jittered(wait: Duration) -> Duration {
    let mut byte = [0];
    // Without entropy the whole wait is as good.
    let _ = getrandom::fill(&mut byte);
    wait - wait / 2 * u32::from(byte[0]) / 255
}

fn unix_s(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_between_half_and_all() {
        for _ in 0..1000 {
            let wait = jittered(Duration::from_secs(1));
            assert!((Duration::from_millis(500)..=Duration::from_secs(1)).contains(&wait), "{wait:?}");
        }
    }
}
