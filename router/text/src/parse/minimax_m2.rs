//! MiniMax-M2, M2.1, M2.5 and M2.7.
//!
//! ```text
//! <minimax:tool_call>
//! <invoke name="f">
//! <parameter name="k">value</parameter>
//! </invoke>
//! </minimax:tool_call>
//! ```

use super::xml_calls::Dialect;

pub const DIALECT: Dialect = Dialect {
    open: "<minimax:tool_call>",
    close: "</minimax:tool_call>",
    call: "<invoke name=",
    call_end: "</invoke>",
    parameter: "<parameter name=",
    parameter_end: "</parameter>",
    line_breaks: false,
};
