//! Bugs that the tests plant to see whether the simulator finds them. Outside of tests the question is constant.

/// One deliberate mistake, at the place that asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// Pages of a failed step stay in the tree.
    TrustUnprovenPages,
    /// Results of an aborted epoch are applied.
    AcceptStaleEpoch,
    /// A page is shared before the step that fills it is over, within that step.
    ShareWithinStep,
    /// The slot of an ended sequence is not ended on its worker.
    ForgetEnd,
    /// One page too many is taken from the cache.
    CacheWholePrompt,
    /// The newest token is not considered when looking for a stop token.
    OverlookStopToken,
    /// A preempted sequence is admitted while a step that samples it is in flight.
    ReadmitTooEarly,
    /// A decode run asks for no page at a page's end.
    MissPageBoundary,
    /// An ended sequence's slot and pages are kept.
    LeakOnEnd,
    /// Pages found in the cache are used without a reference.
    ForgetReference,
    /// The queue has no limit.
    UnboundedQueue,
    /// Log-probabilities of the prompt are delivered again after a resume.
    RepeatPromptLogprobs,
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}

#[cfg(test)]
pub(crate) use for_tests::{plant, planted};

#[cfg(test)]
mod for_tests {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    pub(crate) fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }

    /// Plants `bug` on this thread, until the next call.
    pub(crate) fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }
}
