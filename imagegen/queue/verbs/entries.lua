-- Functions for entries and for the records that name them; put before the scripts that use them.

-- Returns whether an entry is in the stream.
local function exists(stream, entry)
  return string.find(entry, '^%d') and #redis.call('XRANGE', stream, entry, entry) == 1
end

-- Returns whether an entry id comes before another one; false if one of them is no entry id.
local function older(entry, other)
  local ms, number = string.match(entry, '^(%d+)-(%d+)$')
  local other_ms, other_number = string.match(other, '^(%d+)-(%d+)$')
  if not ms or not other_ms then return false end
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms < other_ms or (ms == other_ms and tonumber(number) < tonumber(other_number))
end

-- Returns a record that names another entry.
local function with_entry(record, entry)
  local before, after = string.match(record, '^(%d+ %l+ )%S+( .*)$')
  return before .. entry .. after
end

-- Returns the record of a waiting task.
local function waiting_record(version, entry, epoch, digest, json)
  return version .. ' pending ' .. entry .. ' ' .. epoch .. ' ' .. epoch .. ' ' .. digest .. '\n' .. json
end
