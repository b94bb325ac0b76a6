//! Schema and model: what a task needs, what of it is here, what is on its way.
//!
//! Streams and the control message that names their keys overtake each other, so whichever comes first waits for the
//! other. One schema and one model are kept, the ones that were asked for last: the coordinator does not stream again
//! what this connection has had, and a round that is extended starts from the same model.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use protocol::ids::{ContentId, Hash};
use protocol::messages::{Assigned, ContentRef};

use crate::transfer::ContentKind;

/// Streams that wait for their key: as many as the coordinator may have open (`transport::limits::UNI_STREAMS_MAX`).
const STREAMS_WAITING_MAX: usize = transport::limits::UNI_STREAMS_MAX as usize;

/// Contents of which it is remembered that they are not needed: a few tasks' worth.
const UNNEEDED_MAX: usize = 16;

/// A stream and what it must hold: to be downloaded now.
#[derive(Debug)]
pub(crate) struct Due<S> {
    pub(crate) stream: S,
    pub(crate) content: ContentRef,
    pub(crate) kind: ContentKind,
}

/// What a task needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) schema: Option<Bytes>,
    pub(crate) model: Option<Bytes>,
}

/// The contents of one worker. `S` is a stream whose announcement has been read.
#[derive(Debug)]
pub(crate) struct Contents<S> {
    schema: Option<(Hash, Bytes)>,
    model: Option<(Hash, Bytes)>,
    /// Named by the session, not here yet; true once a stream of it is being read.
    expected: BTreeMap<ContentId, (ContentRef, ContentKind, bool)>,
    /// Here, not named by the session yet.
    arrived: BTreeMap<ContentId, S>,
    /// Named by the session and not needed, the oldest first: their streams are dropped, which stops them. One that nobody
    /// read would hold its share of the connection's window for ever.
    unneeded: VecDeque<ContentId>,
    /// Not needed and not here, the oldest first: this connection streams none of them again.
    gone: VecDeque<ContentId>,
}

impl<S> Contents<S> {
    pub(crate) fn new() -> Self {
        Self {
            schema: None,
            model: None,
            expected: BTreeMap::new(),
            arrived: BTreeMap::new(),
            unneeded: VecDeque::new(),
            gone: VecDeque::new(),
        }
    }

    /// Whether `assigned` needs what this connection has streamed and nobody read: only another one brings it.
    pub(crate) fn is_gone(&self, assigned: &Assigned) -> bool {
        named(assigned).iter().any(|(content, kind)| self.gone.contains(&content.id) && !self.has(&content.hash, *kind))
    }

    /// Expects what `assigned` names and is not here; gives out the streams of it that came before.
    pub(crate) fn expect(&mut self, assigned: &Assigned) -> Vec<Due<S>> {
        let named = named(assigned);
        // What an earlier task wanted may still come, and is not kept then: it would take the place of what is wanted.
        self.expected.retain(|id, _| named.iter().any(|(content, _)| content.id == *id));
        named.into_iter().filter_map(|(content, kind)| self.expect_one(content, kind)).collect()
    }

    fn expect_one(&mut self, content: ContentRef, kind: ContentKind) -> Option<Due<S>> {
        let is_read = self.expected.get(&content.id).is_some_and(|(_, _, reading)| *reading);
        if is_read || self.has(&content.hash, kind) {
            return None;
        }
        let stream = self.arrived.remove(&content.id);
        self.expected.insert(content.id, (content.clone(), kind, stream.is_some()));
        stream.map(|stream| Due { stream, content, kind })
    }

    /// Drops the streams of what `assigned` names and nobody expects: it is here already, or the task needs no work. A
    /// schema that is not here is expected all the same, and its stream given out if it came: a worker that was restarted
    /// and offers what it kept needs none now, but the next task does, and a connection streams nothing twice.
    pub(crate) fn settle(&mut self, assigned: &Assigned) -> Option<Due<S>> {
        let schema = assigned.schema.clone();
        let due = schema.and_then(|schema| self.expect_one(schema, ContentKind::Schema));
        self.drop_unexpected(assigned);
        due
    }

    fn drop_unexpected(&mut self, assigned: &Assigned) {
        for (content, kind) in named(assigned) {
            if self.expected.contains_key(&content.id) {
                continue;
            }
            if self.arrived.remove(&content.id).is_none() {
                remember(&mut self.unneeded, content.id);
            }
            if !self.has(&content.hash, kind) {
                remember(&mut self.gone, content.id);
            }
        }
    }

    /// Takes in a stream; gives it out again if it can be read now.
    pub(crate) fn arrived(&mut self, id: ContentId, stream: S) -> Option<Due<S>> {
        if let Some((content, kind, reading)) = self.expected.get_mut(&id) {
            // A second stream of the same content is not needed.
            let first = !std::mem::replace(reading, true);
            return first.then(|| Due { stream, content: content.clone(), kind: *kind });
        }
        if let Some(at) = self.unneeded.iter().position(|unneeded| *unneeded == id) {
            self.unneeded.remove(at);
            return None;
        }
        while self.arrived.len() >= STREAMS_WAITING_MAX {
            self.arrived.pop_first();
        }
        self.arrived.insert(id, stream);
        None
    }

    /// Keeps what was downloaded, unless something else is wanted by now.
    pub(crate) fn keep(&mut self, content: &ContentRef, kind: ContentKind, bytes: Bytes) {
        if self.expected.remove(&content.id).is_some() {
            match kind {
                ContentKind::Schema => self.schema = Some((content.hash, bytes)),
                ContentKind::Model(_) => self.model = Some((content.hash, bytes)),
            }
        }
    }

    /// Forgets that a content is being read; whether it was still expected.
    pub(crate) fn gave_up(&mut self, id: ContentId) -> bool {
        self.expected.remove(&id).is_some()
    }

    /// Everything that `assigned` needs, once all of it is here.
    pub(crate) fn needs(&self, assigned: &Assigned) -> Option<Needs> {
        let all = named(assigned).iter().all(|(content, kind)| self.has(&content.hash, *kind));
        let bytes = |slot: &Option<(Hash, Bytes)>| slot.as_ref().map(|(_, bytes)| bytes.clone());
        all.then(|| Needs {
            schema: assigned.schema.as_ref().and_then(|_| bytes(&self.schema)),
            model: assigned.model.as_ref().and_then(|_| bytes(&self.model)),
        })
    }

    /// The connection is over: nothing more comes of it.
    pub(crate) fn disconnected(&mut self) {
        self.expected.clear();
        self.arrived.clear();
        self.unneeded.clear();
        self.gone.clear();
    }

    fn has(&self, hash: &Hash, kind: ContentKind) -> bool {
        let slot = match kind {
            ContentKind::Schema => &self.schema,
            ContentKind::Model(_) => &self.model,
        };
        slot.as_ref().is_some_and(|(kept, _)| kept == hash)
    }
}

fn remember(ids: &mut VecDeque<ContentId>, id: ContentId) {
    if ids.len() == UNNEEDED_MAX {
        ids.pop_front();
    }
    ids.push_back(id);
}

fn named(assigned: &Assigned) -> Vec<(ContentRef, ContentKind)> {
    let schema = assigned.schema.iter().map(|content| (content.clone(), ContentKind::Schema));
    let model = assigned.model.iter().map(|content| (content.clone(), ContentKind::Model(assigned.layout)));
    schema.chain(model).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use protocol::ids::TaskId;
    use protocol::messages::{ContentKey, TaskKind};

    use super::*;

    fn content(n: u8) -> ContentRef {
        ContentRef { id: ContentId([n; 16]), key: ContentKey([n; 32]), hash: Hash([n; 32]), bytes: 4 }
    }

    fn update(schema: u8, model: u8) -> Assigned {
        Assigned {
            task: TaskId::new(1, 1),
            round: 1,
            kind: TaskKind::Update,
            schema: Some(content(schema)),
            model: Some(content(model)),
            layout: Hash([9; 32]),
            weight_shift: 0,
        }
    }

    fn fetch(contents: &mut Contents<&'static str>, due: &Due<&'static str>) {
        contents.keep(&due.content, due.kind, Bytes::from_static(b"1234"));
    }

    #[test]
    fn a_stream_waits_for_its_key_and_a_key_for_its_stream() {
        let mut contents = Contents::new();
        assert!(contents.arrived(ContentId([1; 16]), "early").is_none());
        let due = contents.expect(&update(1, 2));
        assert_eq!((due.len(), due[0].stream), (1, "early"));
        fetch(&mut contents, &due[0]);
        assert!(contents.needs(&update(1, 2)).is_none());
        let due = contents.arrived(ContentId([2; 16]), "later").unwrap();
        assert_eq!(due.kind, ContentKind::Model(Hash([9; 32])));
        fetch(&mut contents, &due);
        assert!(contents.needs(&update(1, 2)).unwrap().model.is_some());
    }

    #[test]
    fn what_is_here_is_not_fetched_again() {
        let mut contents = Contents::new();
        contents.expect(&update(1, 2));
        for n in [1, 2] {
            let due = contents.arrived(ContentId([n; 16]), "first").unwrap();
            fetch(&mut contents, &due);
        }
        contents.disconnected();
        assert!(contents.arrived(ContentId([2; 16]), "again").is_none());
        assert!(contents.expect(&update(1, 2)).is_empty());
        assert!(contents.needs(&update(1, 2)).is_some());
        assert!(contents.needs(&update(1, 3)).is_none());
    }

    #[test]
    fn streams_of_what_is_here_are_dropped_whenever_they_come() {
        let mut contents = Contents::new();
        contents.model = Some((Hash([2; 32]), Bytes::new()));
        contents.schema = Some((Hash([1; 32]), Bytes::new()));
        contents.arrived(ContentId([2; 16]), "before");
        assert!(contents.expect(&update(1, 2)).is_empty());
        contents.settle(&update(1, 2));
        assert!(contents.arrived.is_empty());
        assert!(contents.arrived(ContentId([1; 16]), "after").is_none());
        assert!(contents.arrived.is_empty());
        assert!(contents.unneeded.is_empty());
    }

    #[test]
    fn a_task_that_needs_no_work_brings_the_schema_that_the_next_one_needs() {
        for schema_comes_first in [true, false] {
            let mut contents = Contents::new();
            let early = schema_comes_first.then(|| contents.arrived(ContentId([1; 16]), "schema"));
            assert!(early.is_none_or(|due| due.is_none()));
            let due = contents.settle(&update(1, 2));
            let due = due.or_else(|| contents.arrived(ContentId([1; 16]), "schema")).unwrap();
            assert_eq!(due.kind, ContentKind::Schema);
            assert!(contents.arrived(ContentId([2; 16]), "model").is_none());
            assert!(contents.expect(&update(1, 3)).is_empty());
            fetch(&mut contents, &due);
            let due = contents.arrived(ContentId([3; 16]), "the next model").unwrap();
            fetch(&mut contents, &due);
            assert!(contents.needs(&update(1, 3)).is_some());
        }
    }

    #[test]
    fn what_was_dropped_unread_and_is_needed_after_all_comes_with_another_connection_only() {
        for comes_first in [true, false] {
            let mut contents = Contents::new();
            if comes_first {
                contents.arrived(ContentId([2; 16]), "model");
            }
            contents.settle(&update(1, 2));
            if !comes_first {
                assert!(contents.arrived(ContentId([2; 16]), "model").is_none());
            }
            assert!(contents.is_gone(&update(1, 2)) && !contents.is_gone(&update(1, 3)));
            contents.disconnected();
            assert!(!contents.is_gone(&update(1, 2)));
        }
    }

    #[test]
    fn a_model_that_comes_after_its_successor_does_not_replace_it() {
        let mut contents = Contents::new();
        contents.expect(&update(1, 2));
        let stale = contents.arrived(ContentId([2; 16]), "slow").unwrap();
        contents.expect(&update(1, 3));
        for n in [1, 3] {
            let due = contents.arrived(ContentId([n; 16]), "fast").unwrap();
            fetch(&mut contents, &due);
        }
        fetch(&mut contents, &stale);
        assert!(contents.needs(&update(1, 3)).is_some());
    }

    #[test]
    fn the_same_content_is_read_from_one_stream_only() {
        let mut contents = Contents::new();
        contents.expect(&update(1, 2));
        assert!(contents.arrived(ContentId([2; 16]), "one").is_some());
        assert!(contents.arrived(ContentId([2; 16]), "two").is_none());
        assert!(contents.expect(&update(1, 2)).is_empty());
    }

    #[test]
    fn streams_that_nobody_names_are_bounded() {
        let mut contents = Contents::new();
        for n in 0..100 {
            contents.arrived(ContentId([n; 16]), "unknown");
            assert!(contents.arrived.len() <= STREAMS_WAITING_MAX);
        }
    }
}
