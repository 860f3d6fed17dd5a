"""Names of the ops that work number by number."""

from __future__ import annotations

# Each number of the output is of one number of the input.
UNARY = (
    "Identity", "IdentityN", "Snapshot", "StopGradient", "PreventGradient", "CheckNumerics", "CheckNumericsV2",
    "EnsureShape", "Cast", "Relu", "Relu6", "Elu", "Selu", "LeakyRelu", "Softplus", "Softsign", "Tanh", "Sigmoid",
    "Exp", "Expm1", "Log", "Log1p", "Sqrt", "Rsqrt", "Square", "Abs", "Neg", "Sign", "Reciprocal", "Inv", "Erf", "Erfc",
    "Erfinv", "Ndtri", "Lgamma", "Digamma", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh",
    "Acosh", "Atanh", "Floor", "Ceil", "Round", "Rint", "IsNan", "IsInf", "IsFinite", "LogicalNot", "Invert",
    "ZerosLike", "OnesLike", "StringToHashBucket", "StringToHashBucketFast", "StringToHashBucketStrong",
    "StringToNumber", "AsString", "StringLower", "StringUpper", "StringStrip", "StringLength", "Bucketize",
    "DebugIdentityV2", "DebugIdentityV3",
)  # fmt: skip
# Of one number of each input; smaller inputs are repeated.
BROADCAST = (
    "Add", "AddV2", "Sub", "Mul", "Div", "RealDiv", "FloorDiv", "TruncateDiv", "FloorMod", "TruncateMod", "Mod", "Pow",
    "Maximum", "Minimum", "SquaredDifference", "Atan2", "Equal", "NotEqual", "Less", "LessEqual", "Greater",
    "GreaterEqual", "LogicalAnd", "LogicalOr", "Xdivy", "Xlogy", "Xlog1py", "MulNoNan", "DivNoNan", "SelectV2", "AddN",
    "ApproximateEqual", "Igamma", "Igammac", "Zeta", "Polygamma", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    "ClipByValue", "StringJoin",
)  # fmt: skip
