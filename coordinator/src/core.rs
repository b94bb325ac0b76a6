//! The event loop's inner half: the machine, what waits for the disk, and when the disk is asked.
//!
//! A [`Core`] turns what the machine says into [`Effect`]s, in order: jobs for the workshop, events for people, acts for
//! connections. It needs no socket, no clock and no thread, so the real loop ([`crate::fleet`]) and a simulated one
//! drive the same code. Give it inputs, then drain [`Core::next`], then sleep until [`Core::alarm`].
//!
//! Group commit: one sync is under way at a time, and what has to be durable meanwhile waits for the next one, which
//! takes all of it. So the disk is never asked more often than it answers, and each answer releases as much as it can.

use std::collections::VecDeque;

use protocol::federation::{Act, Event, EventNo, Federation, Gate, Input, Notice, Output, Pause};
use protocol::ids::{ConnId, Time};
use protocol::messages::Receipt;

use crate::workshop::Job;

/// Acts and events that may wait for the disk: far more than the largest round has.
const BACKLOG_MAX: usize = 1 << 16;

/// Something to be done, in the order in which it comes.
#[derive(Debug)]
pub enum Effect {
    /// For the workshop.
    Job(Job),
    /// For people and programs that look on.
    Tell(Event),
    /// For connections and the process. What the workshop does of an act comes as a job after it.
    Act(Act),
    /// For the worker's connection: this receipt follows once the disk has answered, and can be signed until then.
    Foresee(ConnId, Receipt),
}

/// A machine, and what waits for the disk.
#[derive(Debug)]
pub struct Core {
    machine: Federation,
    gates: Gates,
    alarm: Option<Time>,
    /// What follows from the last output.
    ready: VecDeque<Effect>,
}

impl Core {
    /// A core around `machine`.
    #[must_use]
    pub fn new(machine: Federation) -> Self {
        Self { machine, gates: Gates::default(), alarm: None, ready: VecDeque::new() }
    }

    /// Takes in one input.
    pub fn input(&mut self, now: Time, input: Input) {
        self.machine.handle(now, input);
    }

    /// Takes in that everything up to this event is durable: the answer to [`Job::Sync`].
    pub fn synced(&mut self, no: EventNo) {
        self.gates.synced = self.gates.synced.max(no);
        self.gates.syncing = self.gates.syncing.filter(|syncing| *syncing > no);
    }

    /// The next thing to do; none until something is taken in again.
    // Not an iterator: after its end it goes on.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Effect> {
        loop {
            if let Some(effect) = self.ready.pop_front() {
                return Some(effect);
            }
            if let Some(event) = self.gates.tellable() {
                return Some(Effect::Tell(event));
            }
            if let Some(act) = self.gates.released() {
                self.release(act);
                continue;
            }
            match self.machine.poll() {
                Output::Append(event) => self.append(event),
                Output::Act { after, act } => self.hold(after, act),
                Output::Wait(alarm) => {
                    self.alarm = alarm;
                    let no = self.gates.sync()?;
                    return Some(Effect::Job(Job::Sync(no)));
                }
            }
        }
    }

    /// When [`Input::Tick`] is to be taken in. As of the last [`Self::next`] that gave nothing.
    #[must_use]
    pub fn alarm(&self) -> Option<Time> {
        self.alarm
    }

    /// Whether so much waits for the disk that nobody is listened to until it has answered: what peers say goes on to
    /// fill their own connections, and not our memory.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.gates.waiting.len() + self.gates.untold.len() >= BACKLOG_MAX
    }

    /// Whether nothing waits for the disk.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.gates.syncing.is_none() && self.gates.wanted <= self.gates.synced
    }

    /// The machine, to look at.
    #[must_use]
    pub fn machine(&self) -> &Federation {
        &self.machine
    }

    fn append(&mut self, event: Event) {
        if event.is_fact() {
            self.ready.push_back(Effect::Job(Job::Append(event.clone())));
        }
        self.gates.append(event);
    }

    /// Does an act, or keeps it until its gate opens.
    fn hold(&mut self, after: Gate, act: Act) {
        let foreseen = match &act {
            Act::Receipt { conn, receipt } => Some(Effect::Foresee(*conn, *receipt)),
            _ => None,
        };
        match self.gates.hold(after, act) {
            Some(act) => self.release(act),
            None => self.ready.extend(foreseen),
        }
    }

    /// Does what the workshop does of an act, and hands on what others do of it.
    fn release(&mut self, act: Act) {
        let job = match &act {
            Act::Forget { task, hash } => Some(Job::Forget(*task, *hash)),
            Act::Step { round, tasks } => Some(Job::Step(*round, tasks.clone())),
            Act::Finish { evaluation } => Some(Job::Finish(*evaluation)),
            Act::Fold { task, hash, weight } => return self.work(Job::Fold(*task, *hash, *weight)),
            Act::Merge { surveys } => return self.work(Job::Merge(surveys.clone())),
            Act::Train { round, rows } => return self.work(Job::Train(*round, rows.clone())),
            Act::Welcome { .. }
            | Act::Assign { .. }
            | Act::Send { .. }
            | Act::Receipt { .. }
            | Act::Receive { .. }
            | Act::Close { .. }
            | Act::Conflict { .. }
            | Act::Fail { .. }
            | Act::End => None,
        };
        self.ready.push_back(Effect::Act(act));
        self.ready.extend(job.map(Effect::Job));
    }

    fn work(&mut self, job: Job) {
        self.ready.push_back(Effect::Job(job));
    }
}

/// Which acts and events wait for what.
#[derive(Debug, Default)]
struct Gates {
    /// The last event that was handed to the store.
    appended: EventNo,
    /// The last event for whose sync anything waits.
    wanted: EventNo,
    /// The last event that is being synced, while a sync is under way.
    syncing: Option<EventNo>,
    /// Up to this one, everything is durable.
    synced: EventNo,
    waiting: VecDeque<(EventNo, Act)>,
    /// What nobody who looks on was told yet.
    untold: VecDeque<(EventNo, Event)>,
}

impl Gates {
    fn append(&mut self, event: Event) {
        self.appended.0 += 1;
        if event.is_commit() {
            self.wanted = self.appended;
        }
        // What was to be told before it may wait for the very room that this asks for.
        if matches!(event, Event::Notice(Notice::Paused(Pause::DiskFull))) {
            self.untold.push_front((self.appended, event));
        } else {
            self.untold.push_back((self.appended, event));
        }
    }

    /// The act, if its gate is open; else it is kept until [`Self::released`].
    fn hold(&mut self, after: Gate, act: Act) -> Option<Act> {
        match after {
            // Events are handed to the store before any act that follows them is looked at.
            Gate::Appended(_) => Some(act),
            Gate::Synced(no) if no <= self.synced => Some(act),
            Gate::Synced(no) => {
                self.wanted = self.wanted.max(no);
                self.waiting.push_back((no, act));
                None
            }
        }
    }

    /// Up to which event a sync is to begin now, if one is: everything that was appended.
    fn sync(&mut self) -> Option<EventNo> {
        if self.syncing.is_some() || self.wanted <= self.synced {
            return None;
        }
        self.syncing = Some(self.appended);
        self.syncing
    }

    /// The next event that may be told: a commit only once it is durable, and nothing that came after it before.
    fn tellable(&mut self) -> Option<Event> {
        let (no, event) = self.untold.front()?;
        if event.is_commit() && *no > self.synced { None } else { self.untold.pop_front().map(|(_, event)| event) }
    }

    /// The next act whose gate has opened, in the order in which they were decided.
    fn released(&mut self) -> Option<Act> {
        let open = self.waiting.front().is_some_and(|(no, _)| *no <= self.synced);
        if open { self.waiting.pop_front().map(|(_, act)| act) } else { None }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use protocol::evaluation::EvaluationSummary;
    use protocol::ids::{ConnId, Instance, RunId, WorkerId};
    use protocol::plan::{LearningPlan, Plan, RoundsSpec};

    const ALICE: ConnId = ConnId(1);
    const BOB: ConnId = ConnId(2);

    fn welcome(conn: ConnId) -> Act {
        Act::Welcome { conn }
    }

    fn commit() -> Event {
        Event::Finished { evaluation: EvaluationSummary::default() }
    }

    fn core() -> Core {
        let plan = Plan::new(LearningPlan::default(), RoundsSpec::default()).unwrap();
        Core::new(Federation::new(plan, RunId([1; 16])))
    }

    /// The syncs that the core asks for now.
    fn syncs(core: &mut Core) -> Vec<u64> {
        let effects = std::iter::from_fn(|| core.next());
        effects.filter_map(|effect| if let Effect::Job(Job::Sync(no)) = effect { Some(no.0) } else { None }).collect()
    }

    #[test]
    fn an_act_waits_for_the_sync_of_what_it_rests_on_and_keeps_its_place() {
        let mut gates = Gates::default();
        assert!(gates.hold(Gate::Appended(EventNo(9)), welcome(ALICE)).is_some());
        assert!(gates.hold(Gate::Synced(EventNo(3)), welcome(ALICE)).is_none());
        assert!(gates.hold(Gate::Synced(EventNo(5)), welcome(BOB)).is_none());
        assert_eq!(gates.released(), None);
        gates.synced = EventNo(4);
        assert_eq!(gates.released(), Some(welcome(ALICE)));
        assert_eq!(gates.released(), None);
        gates.synced = EventNo(5);
        assert_eq!(gates.released(), Some(welcome(BOB)));
        assert!(gates.hold(Gate::Synced(EventNo(5)), welcome(BOB)).is_some());
    }

    #[test]
    fn a_commit_is_told_once_it_is_durable_and_what_follows_it_after_it() {
        let mut gates = Gates::default();
        for event in [Event::Voided, commit(), Event::Voided] {
            gates.append(event);
        }
        assert_eq!(gates.tellable(), Some(Event::Voided));
        assert_eq!(gates.tellable(), None);
        gates.synced = EventNo(2);
        assert_eq!(gates.tellable(), Some(commit()));
        assert_eq!(gates.tellable(), Some(Event::Voided));
        assert_eq!(gates.tellable(), None);
    }

    #[test]
    fn a_full_disk_is_told_while_a_commit_waits_for_room() {
        let mut gates = Gates::default();
        let full = Event::Notice(Notice::Paused(Pause::DiskFull));
        for event in [commit(), full.clone()] {
            gates.append(event);
        }
        assert_eq!(gates.tellable(), Some(full));
        assert_eq!(gates.tellable(), None);
    }

    #[test]
    fn while_the_disk_does_not_answer_what_peers_say_piles_up_only_to_a_bound() {
        let mut core = core();
        core.gates.untold.extend((1..).map(|no| (EventNo(no), commit())).take(BACKLOG_MAX - 1));
        assert!(!core.is_full());
        assert!(core.gates.hold(Gate::Synced(EventNo(1)), welcome(ALICE)).is_none());
        assert!(core.is_full());
        core.synced(EventNo(1));
        assert!(core.next().is_some() && !core.is_full());
    }

    #[test]
    fn one_sync_takes_all_that_waits_and_the_next_begins_when_it_has_returned() {
        let mut core = core();
        for conn in [ALICE, BOB] {
            core.gates.append(Event::Voided);
            core.gates.hold(Gate::Synced(core.gates.appended), welcome(conn));
        }
        core.gates.append(Event::Voided);
        assert_eq!(syncs(&mut core), [3], "what was appended beside it is taken, too");

        core.gates.append(Event::Voided);
        core.gates.hold(Gate::Synced(EventNo(4)), welcome(ALICE));
        core.gates.append(commit());
        assert_eq!(syncs(&mut core), [0; 0], "one is under way");
        core.synced(EventNo(3));
        assert_eq!(syncs(&mut core), [5]);
        core.synced(EventNo(5));
        assert_eq!(syncs(&mut core), [0; 0]);
        assert!(core.is_durable());
    }

    #[test]
    fn a_receipt_that_waits_for_the_disk_is_foreseen_before_the_disk_is_asked_and_said_after_it() {
        let mut core = core();
        let hash = protocol::ids::Hash([1; 32]);
        let (run, worker, task) = (RunId([1; 16]), WorkerId([1; 16]), protocol::ids::TaskId(7));
        let receipt = Receipt { run, worker, task, hash, round: 1, model_hash: hash };
        core.gates.append(commit());
        core.hold(Gate::Synced(EventNo(1)), Act::Receipt { conn: ALICE, receipt });
        let effects: Vec<Effect> = std::iter::from_fn(|| core.next()).collect();
        assert!(matches!(effects[..], [Effect::Foresee(ALICE, _), Effect::Job(Job::Sync(_))]), "{effects:?}");
        core.synced(EventNo(1));
        let effects: Vec<Effect> = std::iter::from_fn(|| core.next()).collect();
        assert!(matches!(effects[..], [Effect::Tell(_), Effect::Act(Act::Receipt { .. })]), "{effects:?}");
    }

    #[test]
    fn what_nobody_waits_for_is_not_synced() {
        let mut core = core();
        core.gates.append(Event::Voided);
        assert!(core.gates.hold(Gate::Appended(EventNo(1)), welcome(ALICE)).is_some());
        assert_eq!(syncs(&mut core), [0; 0]);
        assert!(core.is_durable());
        core.gates.append(commit());
        assert!(!core.is_durable());
        assert_eq!(syncs(&mut core), [2]);
        assert!(!core.is_durable(), "it is asked for, and not answered");
    }

    #[test]
    fn what_a_sync_taken_before_covers_needs_no_other() {
        let mut core = core();
        core.gates.append(commit());
        core.gates.append(Event::Voided);
        assert_eq!(syncs(&mut core), [2]);
        core.gates.hold(Gate::Synced(EventNo(2)), welcome(ALICE));
        core.synced(EventNo(2));
        let effects: Vec<Effect> = std::iter::from_fn(|| core.next()).collect();
        assert!(
            matches!(effects[..], [Effect::Tell(_), Effect::Tell(_), Effect::Act(Act::Welcome { .. })]),
            "{effects:?}"
        );
    }

    #[test]
    fn what_the_machine_says_comes_out_in_its_order() {
        let mut core = core();
        let joined = Input::Joined {
            conn: ALICE,
            worker: WorkerId([1; 16]),
            name: "alice".parse().unwrap(),
            weight_max: 1,
            instance: Instance(1),
        };
        core.input(Time(1), joined);
        let effects: Vec<Effect> = std::iter::from_fn(|| core.next()).collect();
        let told = effects.iter().position(|effect| matches!(effect, Effect::Tell(Event::Notice(_)))).unwrap();
        let welcomed = effects.iter().position(|effect| matches!(effect, Effect::Act(Act::Welcome { .. }))).unwrap();
        assert!(told < welcomed, "{effects:?}");
    }

    #[test]
    fn an_act_that_the_workshop_does_is_a_job_after_what_connections_do_of_it() {
        let mut core = core();
        let hash = protocol::ids::Hash([1; 32]);
        core.release(Act::Forget { task: protocol::ids::TaskId(7), hash });
        core.release(Act::Fold { task: protocol::ids::TaskId(8), hash, weight: 1 });
        let effects: Vec<Effect> = std::iter::from_fn(|| core.next()).collect();
        assert!(
            matches!(
                effects[..],
                [Effect::Act(Act::Forget { .. }), Effect::Job(Job::Forget(..)), Effect::Job(Job::Fold(..))]
            ),
            "{effects:?}"
        );
    }
}
