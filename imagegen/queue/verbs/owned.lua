-- Functions for the entries that a consumer holds; put before the scripts that use them.

local PAGE = 1000

-- Returns the entries that a consumer holds in a range of ids, at most PAGE, as a list and as a set; nil if there is no
-- group.
local function owned(stream, group, consumer, low, high)
  local rows = redis.pcall('XPENDING', stream, group, low, high, PAGE, consumer)
  if rows.err then return nil end
  local list, set = {}, {}
  for i, row in ipairs(rows) do list[i], set[row[1]] = row[1], true end
  return list, set
end

-- Returns whether a consumer holds an entry that is not among the first PAGE of its range.
local function owns(stream, group, consumer, entry, list)
  if #list < PAGE then return false end
  local rows = redis.pcall('XPENDING', stream, group, entry, entry, 1, consumer)
  return not rows.err and #rows == 1
end
