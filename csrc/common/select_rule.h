// How channel_select chooses.
#pragma once

namespace scrimp {

enum class SelectRule : int { threshold, relative, top_k, top_p };

}  // namespace scrimp
