//! Qwen3-Coder: MiniMax-M2's shape in other tags, with a line break inside each end of a value.
//!
//! ```text
//! <tool_call>
//! <function=f>
//! <parameter=k>
//! value
//! </parameter>
//! </function>
//! </tool_call>
//! ```

use super::xml_calls::Dialect;

pub const DIALECT: Dialect = Dialect {
    open: "<tool_call>",
    close: "</tool_call>",
    call: "<function=",
    call_end: "</function>",
    parameter: "<parameter=",
    parameter_end: "</parameter>",
    line_breaks: true,
};
