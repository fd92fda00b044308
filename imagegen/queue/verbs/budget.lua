-- Functions for the budgets of a day; put before the scripts that use them.
--
-- The budgets of a day are 64-bit numbers in one string. Number 0 counts the changes; number n + 1 is what budget n
-- holds, in micro-dollars: reserved for calls to come, and charged for calls that were sent. One command changes all.
--
-- A value that another program wrote there, whose numbers are beyond 53 bits, is moved aside for a week. The change then
-- has number 1, by which instances notice that values are lost, and write them back.
--
-- Text of a change: "<day> <amount> <slot>=<limit> <slot>=<limit> ...", '' for nothing. Only `reserve` needs the
-- limits.

-- Number of commands, then five for each value that was seen: day, count of changes, slot, value, what it changed by.
local budget_reply = {0}

-- Returns the keys of budgets by their day, which ends the name of the key. They are the last of KEYS.
local function keys_of_days(count)
  local keys = {}
  for i = #KEYS - count + 1, #KEYS do keys[string.match(KEYS[i], '%d+$')] = KEYS[i] end
  return keys
end

-- Returns whether numbers were written by another program.
local function are_foreign(values)
  for i, value in ipairs(values) do
    if value > 2 ^ 53 or value < (i == 1 and 1 or -2 ^ 53) then return true end
  end
  return false
end

-- Counts a change, or takes its count back, and adds the amounts of rows by the same factor. Returns the numbers.
local function change_numbers(run, key, rows, factor)
  local ops = {'BITFIELD', key, 'INCRBY', 'i64', '#0', factor}
  for i, row in ipairs(rows) do
    local at, amount = 3 + i * 4, string.format('%.0f', row[2] * factor)
    ops[at], ops[at + 1], ops[at + 2], ops[at + 3] = 'INCRBY', 'i64', '#' .. (row[1] + 1), amount
  end
  return run(unpack(ops))
end

-- Adds the amounts of rows {slot, amount, ...} to the budgets of a day. Returns the values after each, from the second.
local function add_to_budgets(run, key, day, life, rows)
  local values, last, added = change_numbers(run, key, rows, 1), {}, {}
  if values.err then return values end
  if are_foreign(values) then
    change_numbers(run, key, rows, -1)
    run('RENAME', key, key .. ':aside')
    run('EXPIRE', key .. ':aside', 604800)
    values, budget_reply[1] = change_numbers(run, key, rows, 1), budget_reply[1] + 4
  end
  budget_reply[1] = budget_reply[1] + 1
  if values[1] == 1 then
    run('EXPIRE', key, life)
    budget_reply[1] = budget_reply[1] + 1
  end
  for i, row in ipairs(rows) do
    last[row[1]] = values[i + 1]
    added[row[1]] = (added[row[1]] or 0) + tonumber(row[2])
  end
  for slot, value in pairs(last) do
    local at = #budget_reply
    budget_reply[at + 1], budget_reply[at + 2] = tonumber(day), values[1]
    budget_reply[at + 3], budget_reply[at + 4], budget_reply[at + 5] = slot, value, added[slot]
  end
  return values
end

-- Rows of each item: {slot, amount, limit, day, value after it}. Amounts that were taken back, by day and slot.
local reserved_rows, taken_back = {}, {}

-- Reserves the amounts of all items by their texts, whether they fit or not. Each item is then to be checked in this
-- order, with `fits`; if it is not stored it is taken back, so that the items after it are checked without it.
local function reserve(keys, life, count, text_of)
  local pages, days = {}, {}
  for i = 1, count do
    local day, amount, slots = string.match(text_of(i), '^(%d+) (%d+)(.*)$')
    if day then
      local page, own = pages[day], {}
      if not page then
        page = {}
        pages[day], taken_back[day], days[#days + 1] = page, {}, day
      end
      for slot, limit in string.gmatch(slots, '(%d+)=(%-?%d+)') do
        own[#own + 1] = {tonumber(slot), amount, tonumber(limit), day}
        page[#page + 1] = own[#own]
      end
      reserved_rows[i] = own
    end
  end
  for _, day in ipairs(days) do
    local values = add_to_budgets(redis.call, keys[day], day, life, pages[day])
    for i, row in ipairs(pages[day]) do row[5] = values[i + 1] end
  end
end

-- Returns whether an item fits into all of its budgets.
local function fits(i)
  for _, row in ipairs(reserved_rows[i] or {}) do
    if row[5] - (taken_back[row[4]][row[1]] or 0) > row[3] then return false end
  end
  return true
end

-- Notes that an item is not stored.
local function take_back(i)
  for _, row in ipairs(reserved_rows[i] or {}) do
    local sums = taken_back[row[4]]
    sums[row[1]] = (sums[row[1]] or 0) + tonumber(row[2])
  end
end

-- Adds the amounts of texts without a limit, less the amounts that were taken back after `reserve`.
local function settle(run, keys, life, texts)
  local sums_of = {}
  for _, text in ipairs(texts) do
    local day, amount, slots = string.match(text, '^(%d+) (%-?%d+)(.*)$')
    if day and tonumber(amount) ~= 0 then
      local sums = sums_of[day] or {}
      sums_of[day] = sums
      for slot in string.gmatch(slots, ' (%d+)') do
        slot = tonumber(slot)
        sums[slot] = (sums[slot] or 0) + tonumber(amount)
      end
    end
  end
  for day, sums in pairs(taken_back) do
    sums_of[day] = sums_of[day] or {}
    for slot, sum in pairs(sums) do sums_of[day][slot] = (sums_of[day][slot] or 0) - sum end
  end
  for day, sums in pairs(sums_of) do
    local rows = {}
    for slot, sum in pairs(sums) do
      if sum ~= 0 then rows[#rows + 1] = {slot, string.format('%.0f', sum)} end
    end
    if #rows > 0 then add_to_budgets(run, keys[day], day, life, rows) end
  end
end

-- Returns a text that takes nothing back.
local function without_return(text)
  return string.match(text, '^%d+ %-') and '' or text
end

-- Returns the cost in a record's JSON; nil without one. It comes before the request, the only part of a client.
local function cost_in(record)
  local from, to, cost = string.find(record, '"cost":(%b{})')
  local request = from and string.find(record, '"request":', 1, true)
  if not from or (request and request < from) then return nil end
  return cost, from, to
end

-- Returns a record with another cost; unchanged if the record, or the other one, has none.
local function with_cost(record, cost)
  local _, from, to = cost_in(record)
  if not from or cost == '' then return record end
  return string.sub(record, 1, from - 1) .. '"cost":' .. cost .. string.sub(record, to + 1)
end

-- Returns what a cost in JSON charges.
local function charged_in(cost)
  return tonumber(string.match(cost, '"charged":(%d+)') or 0)
end

-- Returns a final record with the cost of the record before it, text of what budgets get then, and the cost. The other
-- instance has written what the task costs if its call in flight is paid. It has not if the cost before is lower: then
-- only the count was raised, for calls that are charged by themselves.
local function with_cost_of(before, value, text)
  local cost, own_cost = cost_in(before), cost_in(value)
  local day, slots = string.match(text, '^(%d+) %-?%d+(.*)$')
  if not cost or not own_cost or charged_in(cost) < charged_in(own_cost) then return value, text, '' end
  local charged = charged_in(cost)
  local reserved = tonumber(string.match(cost, '"reserved":(%d+)') or 0)
  local ended = string.gsub(cost, '"reserved":%d+', '"reserved":0')
  text = string.format('%s %.0f%s', day, charged - reserved, slots)
  return with_cost(value, ended), text, ended
end
