-- Functions for the count of calls that may have been paid twice; put before the scripts that use them.
--
-- The count is the number after `"billed":` in a record's JSON, which is left out while it is 0. It comes before
-- `"request":`, the only part of a record that a client writes.

-- Returns the count in a record, and the places of its first and last digit.
local function billed_in(record)
  local from, to, count = string.find(record, '"billed":(%d+)')
  local request = from and string.find(record, '"request":', 1, true)
  if not from or (request and request < from) then return 0 end
  return tonumber(count), to - #count + 1, to
end

-- Returns a record with the count raised to `count`.
local function with_billed(record, count)
  local ours, from, to = billed_in(record)
  if ours >= count then return record end
  if from then return string.sub(record, 1, from - 1) .. count .. string.sub(record, to + 1) end
  local head, rest = string.match(record, '^([^\n]*\n{)(.*)$')
  if not head then return record end
  return head .. '"billed":' .. count .. (string.sub(rest, 1, 1) == '}' and '' or ',') .. rest
end

-- Returns the count in a record of the same epoch that is not finished, else 0.
local function billed_before(record, epoch)
  local count = billed_in(record)
  if count == 0 then return 0 end
  local state, their_epoch = string.match(record, '^%d+ (%l+) %S+ (%d+) ')
  if (state ~= 'pending' and state ~= 'processing') or their_epoch ~= epoch then return 0 end
  return count
end
